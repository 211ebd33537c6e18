"""The compiled kernels' special cases: planar, dense, paired, flat, in place; cut into parts.

Which of them serves a call depends on sizes that random cases rarely reach.
"""

import pytest
import torch
from cases import Case
from test_depthwise_conv2d import DTYPES, check_case

from lka_kernels import depthwise_conv2d

PLANAR = {
    # Contiguous rows, 3, 5 or 7 taps, or one: neighbouring columns share a vector.
    "one tap": Case(3, 5, 14, 14, (1, 1)),
    "one tap, narrow rows": Case(3, 5, 9, 5, (1, 1)),
    "one tap, padding": Case(2, 5, 12, 37, (1, 1), padding=(1, 2)),
    "one vector a row": Case(3, 5, 14, 14, (3, 3), padding="same"),
    "half a vector a row": Case(3, 5, 7, 7, (5, 5), padding="same"),
    "narrow rows": Case(2, 4, 9, 4, (7, 7), padding="same"),
    "fewer rows than a tall tile": Case(2, 4, 5, 11, (5, 5), padding="same"),
    "the last vector overlaps": Case(2, 3, 10, 37, (7, 7), padding="same"),
    "an odd number of vectors": Case(1, 2, 8, 33, (3, 3), padding="same"),
    "no padding": Case(2, 3, 21, 34, (7, 7)),
    "padding larger than the kernel": Case(2, 3, 9, 6, (3, 3), padding=(8, 11)),
    "a kernel clipped to 5 taps": Case(2, 3, 5, 5, (9, 9), padding=(3, 3)),
    "uneven padding": Case(2, 3, 12, 13, (6, 6), padding="same"),
    "rows apart in memory": Case(2, 3, 12, 17, (5, 5), padding="same", layout="cropped"),
    "one plane many times": Case(3, 4, 12, 17, (3, 3), padding="same", layout="expanded"),
    "rows of all planes interleaved": Case(
        2, 3, 12, 9, (3, 3), padding="same", layout="rows_outermost"
    ),
    "a plane in chunks": Case(1, 2, 130, 95, (5, 5), padding="same"),
    "a plane in chunks of few rows": Case(1, 1, 40, 700, (7, 7), padding="same"),
    "more channels than are summed together": Case(2, 131, 8, 9, (7, 7), padding="same"),
}
DENSE = {
    # The kernel covers the map from every position.
    "exactly": Case(2, 33, 7, 7, (13, 13), padding="same"),
    "and more": Case(2, 16, 4, 6, (31, 30), padding="same"),
    "channels_last": Case(2, 40, 5, 6, (9, 11), padding="same", layout="channels_last"),
    "lanes of several images": Case(9, 3, 5, 5, (9, 9), padding="same"),
    "one row": Case(2, 20, 1, 9, (3, 17), padding="same"),
    "one direction only": Case(2, 20, 5, 9, (9, 9), padding="same"),
}
PAIRED = {
    # bfloat16 takes two rows of the source and two kernel rows at a time where the processor can.
    "an even origin": Case(2, 16, 9, 8, (5, 5), padding=(2, 2), layout="channels_last"),
    "an odd origin": Case(2, 16, 9, 8, (5, 5), padding=(1, 2), layout="channels_last"),
    "an odd height": Case(1, 16, 7, 9, (3, 3), padding="same", layout="channels_last"),
    "an even kernel": Case(2, 16, 10, 9, (4, 6), padding="same", layout="channels_last"),
    "two kernel rows": Case(2, 16, 8, 8, (2, 3), layout="channels_last"),
    "one row of outputs": Case(2, 16, 5, 9, (5, 3), layout="channels_last"),
    "one row of the source": Case(2, 16, 1, 9, (3, 3), padding="same", layout="channels_last"),
    "padding larger than the kernel": Case(
        2, 16, 6, 7, (3, 3), padding=(6, 5), layout="channels_last"
    ),
    "columns dilated": Case(
        2, 16, 9, 17, (5, 3), padding=(2, 4), dilation=(1, 4), layout="channels_last"
    ),
    "half vectors": Case(3, 24, 11, 12, (7, 7), padding="same", layout="channels_last"),
    "idle lanes": Case(2, 37, 11, 12, (7, 7), padding="same", layout="channels_last"),
    "many taps": Case(1, 16, 40, 41, (31, 31), padding="same", layout="channels_last"),
    "transposed": Case(2, 33, 19, 23, (9, 9), padding="same"),
    "lanes of several images": Case(7, 3, 12, 13, (9, 9), padding="same"),
    "columns apart": Case(2, 5, 9, 12, (7, 7), padding="same", layout="transposed"),
    "rows apart": Case(2, 20, 12, 17, (9, 9), padding="same", layout="cropped"),
    "narrow rows": Case(3, 20, 7, 7, (3, 3), padding="same"),
    "stride 2, an even origin": Case(2, 20, 15, 12, (7, 7), (2, 2), padding=(2, 3)),
    "stride 2, an odd origin": Case(
        2, 16, 16, 13, (7, 6), (2, 2), padding=(3, 3), layout="channels_last"
    ),
    "stride 2 of rows": Case(2, 16, 9, 12, (8, 5), (2, 1), padding=(2, 2), layout="channels_last"),
    "stride 2 of columns": Case(
        2, 16, 9, 12, (7, 5), (1, 2), padding=(2, 2), layout="channels_last"
    ),
    "stride 2, one output": Case(
        2, 16, 1, 1, (7, 7), (2, 2), padding=(3, 3), layout="channels_last"
    ),
}
LAST = {"layout": "channels_last", "grad_layout": "channels_last"}
ROW_TILES = {
    # channels_last whose columns fill whole tiles, in bfloat16 channels too: read where they stand.
    f"{taps} taps on {width} columns": Case(2, 32, 9, width, (taps, taps), padding="same", **LAST)
    for width in (7, 14, 21)
    for taps in (3, 5, 7)
} | {
    "the last tile overlaps": Case(2, 64, 5, 13, (7, 7), padding="same", **LAST),
    "the last of three tiles overlaps": Case(1, 32, 5, 20, (5, 5), padding="same", **LAST),
    "a column too many": Case(2, 32, 5, 22, (5, 5), padding="same", **LAST),
    "a partial vector": Case(3, 61, 7, 7, (5, 5), padding="same", **LAST),
    "one channel less": Case(1, 31, 6, 7, (3, 3), padding="same", **LAST),
    "an even number of rows of taps": Case(2, 32, 8, 7, (4, 3), padding=(2, 1), **LAST),
    "one row of taps": Case(2, 32, 8, 7, (1, 3), padding=(0, 1), **LAST),
    "half vectors": Case(2, 24, 9, 14, (5, 5), padding="same", **LAST),
    "a tile before the last moved back": Case(1, 32, 4, 64, (5, 5), padding="same", **LAST),
    "many vectors and a part": Case(1, 147, 5, 7, (3, 3), padding="same", **LAST),
    "many rows of taps": Case(1, 32, 20, 14, (31, 5), padding="same", **LAST),
    "no padding above": Case(2, 32, 9, 14, (5, 5), padding=(0, 2), **LAST),
    "rows beyond the padding": Case(2, 32, 4, 7, (3, 3), padding=(7, 1), **LAST),
    "one row of the source": Case(2, 32, 1, 7, (3, 3), padding="same", **LAST),
    "more columns than rows of taps": Case(2, 32, 9, 14, (3, 7), padding="same", **LAST),
    "more rows than are loaded ahead at a time": Case(
        2, 160, 70, 28, (3, 3), padding="same", **LAST
    ),
    "rows apart": Case(2, 32, 12, 14, (3, 3), padding="same", layout="cropped_channels_last"),
    "rows of the gradient apart": Case(
        2, 61, 8, 7, (5, 5), padding="same", grad_layout="cropped_channels_last"
    ),
    "no bias": Case(2, 32, 7, 7, (5, 5), padding="same", **LAST, bias=False),
}
SPANNED = {
    # A tile as wide as the map leaves out the padding.
    f"{taps} taps on {width} columns": Case(2, 16, 9, width, (taps, taps), padding="same", **LAST)
    for width in (7, 14)
    for taps in (3, 5, 7)
} | {
    "padding on one side": Case(2, 16, 9, 7, (5, 5), padding=(2, 4), **LAST),
    "no padding": Case(2, 16, 11, 11, (5, 5), **LAST),
    "an even kernel": Case(2, 16, 9, 7, (4, 4), padding="same", **LAST),
    "half vectors": Case(3, 24, 7, 7, (5, 5), padding="same", **LAST),
}
IN_PLACE = {
    # channels_last with a stride and few taps: the maps are read where they stand.
    "the usual": Case(2, 32, 14, 14, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "5 taps, odd sizes": Case(2, 16, 13, 17, (5, 5), (2, 2), padding=(2, 2), **LAST),
    "tiles inside the map": Case(2, 16, 9, 48, (5, 5), (2, 2), padding=(2, 2), **LAST),
    "more kernel rows than are summed together": Case(
        2, 16, 14, 15, (7, 3), (2, 2), padding=(3, 1), **LAST
    ),
    "7 taps": Case(2, 32, 14, 14, (7, 7), (2, 2), padding=(3, 3), **LAST),
    "7 taps, odd sizes, a partial block": Case(
        2, 37, 9, 17, (7, 7), (2, 2), padding=(3, 3), **LAST
    ),
    "7 taps, other padding": Case(2, 16, 9, 17, (5, 7), (2, 2), padding=(3, 2), **LAST),
    "7 taps, a clipped kernel": Case(2, 16, 3, 3, (7, 7), (2, 2), padding=(3, 3), **LAST),
    "7 columns, rows by themselves": Case(2, 16, 8, 13, (5, 7), (1, 2), padding=(2, 3), **LAST),
    "a partial block": Case(3, 37, 9, 11, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "half vectors": Case(3, 24, 9, 11, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "stride in one direction": Case(2, 16, 9, 11, (3, 5), (1, 2), padding=(1, 2), **LAST),
    "steps over the kernel": Case(2, 16, 12, 13, (3, 3), (4, 4), padding=(1, 1), **LAST),
    "a stride larger than the map": Case(2, 16, 3, 2, (2, 2), (7, 7), **LAST),
    "dilated": Case(2, 16, 15, 13, (3, 3), (2, 2), padding=(3, 3), dilation=(3, 3), **LAST),
    "dilation and stride share a factor": Case(
        2, 16, 15, 13, (3, 3), (2, 2), padding=(2, 2), dilation=(2, 2), **LAST
    ),
    "padding larger than the kernel": Case(2, 16, 6, 7, (3, 3), (2, 2), padding=(6, 5), **LAST),
    "no output sees every tap": Case(2, 16, 2, 2, (5, 5), (2, 2), padding=(4, 4), **LAST),
    "no row meets a tap": Case(
        2, 16, 1, 7, (2, 3), (2, 2), padding=(1, 1), dilation=(2, 1), **LAST
    ),
    "one pixel": Case(2, 16, 1, 1, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "more channels than are taken together": Case(
        2, 131, 8, 9, (3, 3), (2, 2), padding=(1, 1), **LAST
    ),
    "one image": Case(1, 16, 33, 35, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "rows in equal parts": Case(5, 400, 7, 7, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "the gradient in another layout": Case(
        2, 20, 9, 9, (3, 3), (2, 2), padding=(1, 1), layout="channels_last"
    ),
    "no bias": Case(2, 16, 9, 9, (3, 3), (2, 2), padding=(1, 1), **LAST, bias=False),
}
FEW_CHANNELS = {
    # channels_last with fewer channels than a vector has lanes. From half of a narrow one on, or of
    # a single image, a vector holds one image's; else lanes of several images are gathered.
    f"{channels} channels of {batch} images": Case(
        batch, channels, 9, 21, (3, 3), padding="same", **LAST
    )
    for batch in (1, 7)
    for channels in (2, 3, 4, 7, 11)
} | {
    "rows as wide as are gathered together": Case(9, 3, 5, 16, (5, 5), padding="same", **LAST),
    "a row of one column": Case(9, 3, 7, 1, (3, 1), padding=(1, 0), **LAST),
    "stride 2": Case(9, 3, 18, 37, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "stride 2, 7 channels": Case(3, 7, 18, 37, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "dilated": Case(9, 3, 18, 19, (3, 3), padding=(3, 2), dilation=(3, 2), **LAST),
    "many taps": Case(5, 3, 18, 19, (13, 13), padding="same", **LAST),
    "the kernel covers the map": Case(9, 3, 5, 5, (9, 9), padding="same", **LAST),
    "rows apart": Case(9, 3, 9, 21, (3, 3), padding="same", layout="cropped_channels_last"),
    "the gradient in another layout": Case(
        9, 3, 9, 21, (3, 3), padding="same", layout="channels_last"
    ),
}
TILED = (
    {
        # channels_last, unit steps and 1 to 5 or 7 taps in a row that row tiles leave.
        f"{taps} taps on {width} columns": Case(
            2, 37, 9, width, (taps, taps), padding=(taps // 2, taps // 2), **LAST
        )
        for width in (5, 7, 17)
        for taps in (1, 2, 4, 5)
    }
    | {
        f"{taps} taps, dilation {dilation}": Case(
            2,
            20,
            15,
            19,
            (taps, taps),
            padding=(taps // 2 * dilation, taps // 2 * dilation),
            dilation=(dilation, dilation),
            **LAST,
        )
        for taps in (2, 3, 7)
        for dilation in (2, 3)
    }
    | {
        "more dilation than columns": Case(
            2, 20, 9, 5, (3, 3), padding=(7, 7), dilation=(7, 7), **LAST
        ),
        "dilated rows": Case(2, 20, 15, 19, (3, 3), padding=(2, 1), dilation=(2, 1), **LAST),
        "dilated columns": Case(2, 20, 15, 19, (3, 3), padding=(1, 2), dilation=(1, 2), **LAST),
        "no padding, dilated": Case(2, 20, 15, 19, (3, 3), dilation=(2, 3), **LAST),
        "padding larger than the kernel": Case(2, 20, 6, 7, (2, 2), padding=(5, 6), **LAST),
        "uneven padding": Case(2, 24, 8, 9, (4, 4), padding="same", **LAST),
        "a stride that is the dilation": Case(
            2, 20, 18, 23, (3, 3), (2, 2), padding=(2, 2), dilation=(2, 2), **LAST
        ),
        "one tap, dilation": Case(2, 20, 9, 17, (3, 1), padding=(3, 0), dilation=(3, 5), **LAST),
        "one tap, stride 2": Case(2, 20, 9, 17, (1, 1), (2, 2), **LAST),
        "one tap, stride 3, dilation 2": Case(
            2, 20, 9, 17, (2, 1), (3, 3), dilation=(2, 2), **LAST
        ),
        "a stride of 3": Case(2, 20, 18, 23, (3, 3), (3, 3), padding=(1, 1), **LAST),
        "a stride of 9, more phases than are taken together": Case(
            2, 20, 20, 23, (3, 3), (9, 9), padding=(1, 1), **LAST
        ),
        "a stride of 4, 5 taps": Case(2, 20, 18, 23, (5, 5), (4, 4), padding=(2, 2), **LAST),
        "two vectors that overlap": Case(2, 24, 9, 14, (3, 3), padding="same", **LAST),
        "a row of taps": Case(2, 40, 8, 19, (1, 7), padding="same", **LAST),
        **{
            f"a row of {taps} taps": Case(2, 37, 3, 28, (1, taps), padding="same", **LAST)
            for taps in range(8, 15)
        },
        "a long row in the middle": Case(2, 16, 3, 70, (1, 11), padding="same", **LAST),
        "as long a row as is tiled": Case(2, 20, 3, 63, (1, 49), padding="same", **LAST),
        "a row longer than the map": Case(2, 20, 3, 7, (1, 21), padding="same", **LAST),
        "a long row, dilated": Case(2, 20, 3, 40, (1, 9), padding=(0, 8), dilation=(1, 2), **LAST),
        "a long row, no padding": Case(2, 20, 3, 40, (1, 12), **LAST),
        "a long row between rows of padding": Case(2, 20, 3, 21, (1, 9), padding=(2, 4), **LAST),
        "rows apart": Case(2, 20, 12, 13, (2, 2), layout="cropped_channels_last"),
        "no bias": Case(2, 20, 9, 9, (2, 2), **LAST, bias=False),
        # Two rows of two taps, of which bfloat16 makes pairs, in tiles of 14 outputs too.
        **{
            f"2 taps, {width} columns in wide tiles": Case(
                2, 37, 5, width, (2, 2), padding=(1, 1), **LAST
            )
            for width in (27, 28, 41)
        },
        "2 taps, a tile without its first and last column": Case(
            2, 37, 5, 6, (2, 2), padding=(1, 1), **LAST
        ),
        "2 taps, three rows dilated": Case(
            2, 16, 9, 27, (3, 2), padding=(2, 1), dilation=(2, 1), **LAST
        ),
    }
)
BY_CHANNELS = {
    # Steps that leave next to nothing for outputs to share: several blocks of channels at a time.
    # So are weight gradients of two taps in a row, and of three but for the usual steps.
    f"{taps} taps, stride {stride}": Case(
        2, channels, 11, 31, (taps, taps), (stride, stride), padding=(taps // 2, taps // 2), **LAST
    )
    for channels, taps, stride in ((208, 2, 2), (80, 3, 3), (64, 4, 4), (112, 5, 4), (192, 2, 4))
} | {
    "unit steps, 2 taps": Case(2, 147, 9, 13, (2, 2), padding=(1, 1), **LAST),
    "unit steps, 1 × 2 taps": Case(2, 72, 9, 13, (1, 2), padding="same", **LAST),
    "unit steps, 3 × 2 taps": Case(2, 72, 9, 13, (3, 2), padding="same", **LAST),
    "3 taps, dilation 2": Case(2, 80, 9, 13, (3, 3), padding="same", dilation=(2, 2), **LAST),
    "no bias": Case(2, 96, 11, 14, (2, 2), (2, 2), **LAST, bias=False),
    "dilated": Case(2, 64, 11, 14, (2, 3), (3, 4), padding=(1, 3), dilation=(2, 2), **LAST),
    "padding larger than the kernel": Case(2, 64, 6, 7, (2, 2), (2, 3), padding=(5, 7), **LAST),
    "rows apart": Case(2, 64, 12, 13, (3, 3), (3, 3), layout="cropped_channels_last"),
}
WIDE_STEPS = (
    {
        # Beyond a stride of two outputs share little, and phases of the input's gradient have few
        # taps: one to three in a row, on few and on many columns.
        f"{taps} taps, stride {stride}, {channels} channels on {width} columns": Case(
            2, channels, 13, width, (taps, taps), (stride, stride), (taps // 2, taps // 2), **LAST
        )
        for channels, taps, stride, width in (
            (64, 5, 3, 14),
            (80, 5, 3, 37),
            (64, 6, 3, 41),
            (72, 6, 3, 23),
            (128, 7, 4, 17),
            (64, 7, 4, 50),
            (96, 6, 4, 33),
            (24, 7, 4, 29),
            (64, 9, 3, 31),
            (96, 11, 4, 35),
            (64, 6, 2, 15),
            (40, 6, 2, 30),
        )
    }
    | {
        # Weight gradients whose outputs share nothing, of as many channels as are taken together.
        f"3 taps, stride {stride}, {channels} channels": Case(
            3, channels, 14, 23, (3, 3), (stride, stride), padding=(1, 1), **LAST
        )
        for channels in (16, 32, 64)
        for stride in (3, 4)
    }
    | {
        "rows three and columns four apart": Case(2, 64, 14, 23, (5, 7), (3, 4), (2, 3), **LAST),
        "many rows of a step": Case(2, 64, 30, 9, (12, 3), (3, 3), (4, 1), **LAST),
        "wide steps, dilated": Case(
            2, 64, 20, 24, (6, 6), (3, 3), padding=(5, 5), dilation=(2, 2), **LAST
        ),
        "wide steps, no padding, no bias": Case(2, 64, 15, 29, (6, 7), (3, 4), **LAST, bias=False),
    }
)
ONE_LEFT = {
    # Tiles of 7 or 14 outputs leave one of a row, which is computed by itself. Beside these, rows
    # that look alike but leave none: some with 3 taps have tiles of 5, and sums in runs.
    f"{taps} taps on {width} columns": Case(
        2, channels, 5, width, (3, taps), padding=(1, taps // 2), **LAST
    )
    for channels, width, taps in (
        *((20, 15 - (taps + 1) % 2, taps) for taps in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16)),
        *((16, 29 - (taps + 1) % 2, taps) for taps in (2, 6, 9)),
    )
} | {
    "no padding": Case(2, 20, 9, 18, (4, 4), **LAST),
    "beyond the map": Case(2, 20, 5, 6, (3, 2), padding=(1, 5), **LAST),
    "half vectors": Case(3, 24, 5, 14, (4, 4), padding=(2, 2), **LAST),
    "dilated": Case(2, 20, 9, 24, (3, 5), padding=(3, 6), dilation=(3, 3), **LAST),
    "some ways of dilated columns": Case(
        2, 20, 5, 29, (2, 4), padding=(1, 6), dilation=(1, 4), **LAST
    ),
    "rows dilated": Case(2, 20, 9, 15, (3, 5), padding=(2, 2), dilation=(2, 1), **LAST),
    "four rows and more": Case(2, 20, 9, 15, (7, 7), padding="same", **LAST),
    "in runs": Case(2, 20, 20, 15, (31, 5), padding="same", **LAST),
    "a long row": Case(2, 16, 3, 29, (1, 9), padding="same", **LAST),
    "stride 2": Case(2, 20, 9, 15, (3, 3), (2, 2), padding=(1, 1), **LAST),
    "stride 2 of columns, 5 taps": Case(2, 20, 9, 29, (3, 5), (1, 2), padding=(1, 2), **LAST),
    "stride 2, no padding": Case(2, 20, 9, 17, (3, 3), (2, 2), **LAST),
    "rows apart": Case(2, 20, 12, 15, (4, 5), padding=(1, 2), layout="cropped_channels_last"),
    "no bias": Case(2, 20, 7, 7, (4, 4), padding=(2, 2), **LAST, bias=False),
}
COLUMNS_OF_TAPS = (
    {
        # A column of taps becomes a row where pixels of channels_last maps are long.
        f"{taps} taps": Case(2, 136, 19, 12, (taps, 1), padding="same", **LAST)
        for taps in (2, 3, 7, 11, 21)
    }
    | {
        # So many rows that a task's weight gradient takes four of them together.
        f"{taps} taps, {channels} channels of many rows": Case(
            5, channels, 32, 6, (taps, 1), padding="same", **LAST
        )
        for channels, taps in ((40, 3), (40, 5), (72, 7), (136, 7))
    }
    | {
        # Parts of an image of four rows each, of which the last is lower.
        f"{taps} taps on {height} rows of {batch}": Case(
            batch, channels, height, 5, (taps, 1), padding="same", **LAST
        )
        for batch, channels, height, taps in (
            (1, 200, 28, 7),
            (2, 72, 30, 5),
            (3, 40, 29, 7),
            (9, 24, 31, 4),
            (2, 72, 28, 8),
            (1, 40, 35, 11),
            (3, 16, 29, 14),
            (2, 136, 30, 15),
        )
    }
    | {
        "stride 2": Case(2, 136, 19, 12, (7, 1), (2, 2), padding=(3, 0), **LAST),
        "stride 2 of rows": Case(2, 136, 19, 12, (5, 1), (2, 1), padding=(2, 0), **LAST),
        "dilated": Case(2, 136, 19, 12, (9, 1), padding=(8, 0), dilation=(2, 1), **LAST),
        "padding beside it": Case(2, 136, 9, 5, (3, 1), padding=(1, 2), **LAST),
        "uneven padding": Case(2, 136, 9, 5, (8, 1), padding="same", **LAST),
        "covers the map": Case(2, 136, 7, 5, (13, 1), padding="same", **LAST),
        "as many rows with the padding as columns": Case(
            2, 136, 14, 16, (3, 1), padding="same", **LAST
        ),
        "rows apart": Case(2, 136, 12, 13, (5, 1), padding="same", layout="cropped_channels_last"),
    }
)
ONE_COLUMN = {
    # Of contiguous maps the weight gradient of a column of taps is a column of sums, up to seven of
    # which are taken together.
    f"{taps} taps": Case(2, 20, 17, 9, (taps, 1), padding=(taps // 2, 0))
    for taps in (4, 5, 6, 7, 9, 13)
} | {
    # Of so many rows of taps that an image is not cut into as many parts as there could be.
    "21 taps": Case(1, 40, 40, 17, (21, 1), padding=(10, 0)),
    "13 × 2 taps, stride 2": Case(1, 24, 45, 20, (13, 2), (2, 1), padding=(6, 1)),
}
OVERLAPPING = {
    # The weight gradient of channels_last maps in place: the last vector ends with the channels.
    f"{channels} channels{', stride 2' * (stride == 2)}": Case(
        2, channels, 9, 13, (3, 3), (stride, stride), padding=(1, 1), **LAST
    )
    for channels in (17, 31, 40, 72, 147)
    for stride in (1, 2)
} | {
    "more channels than tasks": Case(1, 523, 5, 7, (3, 3), padding="same", **LAST),
    "more kernel rows than are summed together": Case(
        2, 23, 14, 15, (7, 3), (2, 2), padding=(3, 1), **LAST
    ),
    "dilated": Case(2, 23, 15, 13, (3, 3), (2, 2), padding=(3, 3), dilation=(3, 3), **LAST),
}
FLAT = {
    # bfloat16 takes whole planes as vectors in the weight gradient where the processor can.
    "less than a vector": Case(3, 5, 5, 6, (3, 3), padding="same"),
    "one vector": Case(2, 5, 4, 8, (5, 5), padding="same"),
    "two vectors": Case(3, 5, 7, 7, (7, 7), padding="same"),
    "all bits of a mask": Case(2, 5, 8, 8, (5, 5), padding="same"),
    "one position too many": Case(2, 5, 5, 13, (3, 3), padding="same"),
    "wider than high": Case(2, 4, 5, 7, (5, 5), padding="same"),
    "higher than wide": Case(2, 4, 21, 3, (3, 3), padding="same"),
    "one row": Case(2, 4, 1, 9, (3, 3), padding="same"),
    "one image": Case(1, 37, 7, 7, (3, 3), padding="same"),
    "more images than are taken together": Case(35, 3, 7, 7, (3, 3), padding="same"),
    "parts of the batch": Case(35, 1, 7, 7, (5, 5), padding="same"),
    "more channels than tasks": Case(2, 131, 7, 7, (5, 5), padding="same"),
    "fewer rows of outputs": Case(2, 5, 9, 7, (3, 3), padding=(0, 1)),
    "more rows of outputs": Case(2, 5, 4, 7, (3, 3), padding=(3, 1)),
    "columns of other outputs": Case(2, 5, 7, 6, (3, 3), padding=(1, 0)),
    "a kernel clipped to 5 taps": Case(3, 5, 3, 3, (9, 9), padding="same"),
    "a kernel clipped in height": Case(3, 5, 2, 9, (9, 3), padding="same"),
    "a kernel clipped in width": Case(3, 5, 9, 2, (3, 9), padding="same"),
    "no bias": Case(3, 5, 7, 7, (3, 3), padding="same", bias=False),
    "rows apart": Case(2, 5, 7, 7, (3, 3), padding="same", layout="cropped"),
    "rows of the gradient apart": Case(2, 5, 7, 7, (3, 3), padding="same", grad_layout="cropped"),
    "columns apart": Case(2, 5, 7, 7, (3, 3), padding="same", layout="transposed"),
    "one image many times": Case(5, 5, 7, 7, (3, 3), padding="same", layout="expanded"),
    "one channel many times": Case(
        3, 5, 7, 7, (3, 3), padding="same", grad_layout="expanded_channels"
    ),
    "the gradient in another layout": Case(
        2, 20, 7, 7, (3, 3), padding="same", grad_layout="channels_last"
    ),
    # With a stride, the gradient's elements are spread over the plane of the input.
    "stride 2": Case(3, 37, 7, 7, (3, 3), (2, 2), padding=(1, 1)),
    "stride 2, 7 taps": Case(2, 5, 7, 7, (7, 7), (2, 2), padding=(3, 3)),
    "stride 2, an even map": Case(2, 5, 8, 8, (5, 5), (2, 2), padding=(2, 2)),
    "stride 2, no padding": Case(2, 5, 8, 7, (3, 3), (2, 2)),
    "stride 2, more padding than taps": Case(2, 5, 3, 4, (3, 3), (2, 2), padding=(4, 5)),
    "stride 2 of rows": Case(2, 5, 9, 6, (3, 3), (2, 1), padding=(1, 1)),
    "stride 2 of columns": Case(2, 5, 6, 9, (3, 3), (1, 2), padding=(1, 1)),
    "stride 3 and 4": Case(2, 5, 8, 8, (5, 5), (3, 4), padding=(2, 2)),
    "stride 2, rows of 14": Case(3, 5, 14, 14, (3, 3), (2, 2), padding=(1, 1)),
    "stride 2, rows of 16": Case(3, 5, 13, 16, (5, 5), (2, 2), padding=(2, 2)),
    "stride 2, a column too many": Case(2, 5, 9, 17, (3, 3), (2, 2), padding=(1, 1)),
    "stride 2, outputs beside the map": Case(2, 5, 4, 4, (3, 3), (1, 2), padding=(9, 9)),
    "stride 2, a column of outputs too many": Case(2, 5, 6, 4, (3, 3), (2, 1), padding=(1, 7)),
    "stride 2, rows apart": Case(2, 5, 14, 14, (3, 3), (2, 2), padding=(1, 1), layout="cropped"),
    "stride 2, dilated": Case(2, 5, 7, 7, (3, 3), (2, 2), padding=(2, 2), dilation=(2, 2)),
    "stride 2, clipped": Case(2, 5, 3, 3, (9, 9), (2, 2), padding=(4, 4)),
    "stride 2, one output": Case(40, 5, 2, 2, (3, 3), (2, 2), padding=(1, 1)),
    "stride 2, no bias": Case(2, 5, 7, 7, (3, 3), (2, 2), padding=(1, 1), bias=False),
    "stride 2, rows of the gradient apart": Case(
        2, 5, 7, 7, (3, 3), (2, 2), padding=(1, 1), grad_layout="cropped"
    ),
}


# What every dtype takes.
CASES = {
    f"{kernels}: {name}": case
    for kernels, cases in {
        "planar": PLANAR,
        "dense": DENSE,
        "row tiles": ROW_TILES,
        "spanned": SPANNED,
        "in place": IN_PLACE,
        "one output left": ONE_LEFT,
        "few channels": FEW_CHANNELS,
        "tiled": TILED,
        "by channels": BY_CHANNELS,
        "wide steps": WIDE_STEPS,
        "columns of taps": COLUMNS_OF_TAPS,
        "one column": ONE_COLUMN,
        "overlapping": OVERLAPPING,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FLAT.values(), ids=FLAT)
def test_flat(case, dtype):
    check_case(case, dtype, "direct")


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PAIRED.values(), ids=PAIRED)
def test_paired(case, dtype):
    check_case(case, dtype, "direct")


@pytest.mark.usefixtures("compiled_cpu")
def test_an_infinity_reaches_one_row_more_at_most():
    """The missing half of a pair of kernel rows is zero, and zero times infinity is not."""
    x = torch.zeros(1, 16, 16, 9, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    x[:, :, 8, 4] = float("inf")
    y = depthwise_conv2d(x, torch.ones(16, 1, 3, 3, dtype=torch.bfloat16), padding=1)
    finite = y.isfinite().all(3).all(1)[0]
    assert not finite[7:10].any()
    assert finite[:6].all()
    assert finite[11:].all()


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_direct_sums(case, dtype):
    check_case(case, dtype, "direct")


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in COLUMNS_OF_TAPS if "stride" not in name])
def test_transforms_of_columns_of_taps(name, dtype):
    check_case(COLUMNS_OF_TAPS[name], dtype, "fft")


@pytest.mark.usefixtures("compiled_cpu")
def test_dense_bands():
    """Bits do not depend on threads where one block of channels is cut into bands."""
    x, weight = torch.randn(1, 3, 24, 24), torch.randn(3, 1, 47, 47)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(depthwise_conv2d(x, weight, padding="same", method="direct"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 3), (5, 2), (2, 40)])
@pytest.mark.parametrize(
    ("kernel", "size"), [(3, (65, 40)), (7, (65, 40)), (25, (65, 40)), (3, (7, 7)), (7, (7, 7))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(batch, channels, kernel, size, dtype):
    """Also where a plane is cut into bands because there are fewer planes than threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *size, generator=generator).to(dtype)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator).to(dtype)
    same_bits_with_any_threads(x, weight, padding=kernel // 2)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kernel", [3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_channels_last_maps_do_not_depend_on_threads(batch, kernel, dtype):
    """Also of those that are read where they stand, in bands."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 96, 13, 14, generator=generator).to(dtype)
    weight = torch.randn(96, 1, kernel, kernel, generator=generator).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    same_bits_with_any_threads(last, weight, padding=kernel // 2)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kernel", [3, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_strided_maps_do_not_depend_on_threads(batch, kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 40, 33, 30, generator=generator).to(dtype)
    weight = torch.randn(40, 1, kernel, kernel, generator=generator).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    same_bits_with_any_threads(last, weight, stride=2, padding=kernel // 2)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize("size", [(24, 2), (33, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_of_long_sums_do_not_depend_on_threads(size, dtype):
    """Sums of so many terms that they are cut into runs, and other tiles for other threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, *size, generator=generator).to(dtype)
    weight = torch.randn(3, 1, 31, 27, generator=generator).to(dtype)
    same_bits_with_any_threads(x, weight, padding=(15, 13), method="direct")


def same_bits_with_any_threads(x, weight, **geometry):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
            y = depthwise_conv2d(*leaves, **geometry)
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(3))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
