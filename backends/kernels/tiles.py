"""Tiles of rows when the rows of several requests lie one after the other."""

from __future__ import annotations

from backends.kernels.dispatch import tl, triton


@triton.jit
def request_of_tile(tile, starts_pointer, num_requests, tile_rows):
    """Request that owns a tile of rows, when r owns tiles from starts[r] // tile_rows + r.

    This leaves each request at least ceil(rows / tile_rows) tiles without reading lengths on the
    host; all of them together have total rows // tile_rows + num_requests.
    """
    low = tile * 0
    high = low + num_requests
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = tl.load(starts_pointer + middle) // tile_rows + middle
        low = tl.where(first_tile <= tile, middle, low)
        high = tl.where(first_tile <= tile, high, middle)
    return low


@triton.jit
def place_of_tile(tile, starts_pointer, num_requests, tile_rows):
    """Request of a tile, where its rows start, how many they are, and the first of the tile.

    That first one is past the last for the tiles that some requests own and do not need.
    """
    request = request_of_tile(tile, starts_pointer, num_requests, tile_rows)
    start = tl.load(starts_pointer + request)
    rows = tl.load(starts_pointer + request + 1) - start
    return request, start, rows, (tile - start // tile_rows - request) * tile_rows


@triton.jit
def count_up_to(positions_pointer, num_positions, last):
    """How many of the increasing positions are at most `last`."""
    low = num_positions * 0
    high = num_positions
    while low < high:
        middle = (low + high) // 2
        is_seen = tl.load(positions_pointer + middle) <= last
        low = tl.where(is_seen, middle + 1, low)
        high = tl.where(is_seen, high, middle)
    return low
