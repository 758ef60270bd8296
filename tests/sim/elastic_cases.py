"""A deployment of elastic instances in a few lines."""

from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase

MEASURED_4 = PrefillScaling(base_s=37.4e-3, token_s=0.00998e-3, square_s=1.934e-10)
"""Fitted to measurements of four instances of two GPUs."""


def paper_base(degrees: int = 4) -> ScalingBase:
    """LWM-7B on instances of two A800, as interpolated from one to four instances and beyond."""
    found = [
        PrefillScaling(
            base_s=(17 + 7 * (d - 1)) * 1e-3,
            token_s=0.030e-3 / d * (1 + 0.11 * (d - 1)),
            square_s=7.8e-10 / d,
        )
        for d in range(1, degrees + 1)
    ]
    if degrees >= 4:
        found[3] = MEASURED_4
    decode = DecodeScaling(
        base_s=9.8e-3, request_s=0.0, master_request_s=0.015e-3, context_token_s=4.76e-8
    )
    return ScalingBase(
        name="paper", model="lwm_7b", device="a800", tp_size=2, prefill=found, decode=decode,
        source="interpolated",
    )  # fmt: skip
