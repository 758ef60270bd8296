"""Requests as long as those of LoongServe's datasets: a few tokens up to half a million."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from sim.workload.dataset_lengths import (
    L_EVAL,
    LV_EVAL,
    SHAREGPT,
    DatasetLoad,
    whole_prompts,
)


class Dataset(Enum):
    """Whose lengths. Member names are what the command line takes."""

    sharegpt = "sharegpt"
    """Chats: prompts of 4 to 2,300 tokens."""
    l_eval = "l_eval"
    """2,700 to 210,500 tokens."""
    lv_eval = "lv_eval"
    """15,100 to 497,300 tokens."""
    mixed = "mixed"
    """Each request is of any of the three, all as likely."""


_OF = {
    Dataset.sharegpt: (SHAREGPT,),
    Dataset.l_eval: (L_EVAL,),
    Dataset.lv_eval: (LV_EVAL,),
    Dataset.mixed: (SHAREGPT, L_EVAL, LV_EVAL),
}


@dataclass(kw_only=True)
class LongContext(DatasetLoad):
    """Poisson arrivals with prompts and answers as long as a dataset's.

    Only the ranges of the prompts are published: see `sim/workload/dataset_lengths.py` for what was
    derived and what is assumed.
    """

    dataset: Dataset = Dataset.mixed
    """Whose lengths: sharegpt, l_eval, lv_eval, or mixed, any of the three."""

    def prompts(
        self, uniforms: NDArray[np.float64], choices: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `DatasetLoad.prompts`."""
        among = np.array(_OF[self.dataset])
        of = among[(choices * len(among)).astype(np.int64)]
        drawn = np.stack([whole_prompts(one, uniforms) for one in (SHAREGPT, L_EVAL, LV_EVAL)])
        return drawn[of, np.arange(len(of))], of
