"""What would mend a plan whose packs stay part empty or uneven."""

import numpy as np

from data_pipeline.settings import DataSettings
from data_pipeline.stats.placed import Placed

# Where less is lost, no setting wins much.
MIN_EFFICIENCY, MAX_PADDING = 0.9, 0.03
# Packs that hold so many long samples can be filled, and made equal.
LONG_IN_A_PACK = 4


def advice(placed: Placed, data: DataSettings) -> str | None:
    """One sentence: what is lost, why, and which settings help; None where little is lost."""
    pack = data.pack
    measures = placed.measures(pack.max_tokens)
    if measures.efficiency >= MIN_EFFICIENCY and measures.padding <= MAX_PADDING:
        return None
    lost = (
        f"padding is {100 * measures.padding:.1f} % and efficiency "
        f"{100 * measures.efficiency:.1f} %"
    )
    per_pack = placed.num_steps * pack.packs_per_step
    tiles, tokens = placed.tiles.sum() / per_pack, int(placed.tokens.sum() / per_pack)
    if pack.max_tiles and tiles > 0.9 * pack.max_tiles and measures.padding > MAX_PADDING:
        return (
            f"{lost}: packs are full of tiles ({tiles:.1f} of data.pack.max_tiles="
            f"{pack.max_tiles}) before they are full of tokens; raise that, or lower "
            f"data.pack.max_tokens to {tokens:,}"
        )
    long = int(np.quantile(placed.tokens, 0.9))
    if long * LONG_IN_A_PACK > pack.max_tokens:
        enough = 1 << (LONG_IN_A_PACK * long - 1).bit_length()
        fewer = f", or data.tiling.max_tiles below {data.tiling.max_tiles}"
        return (
            f"{lost}: long samples (a tenth has {long:,} tokens or more) are "
            f"{100 * long / pack.max_tokens:.0f} % of a pack of {pack.max_tokens:,}; "
            f"data.pack.max_tokens={enough} packs them closely"
            f"{fewer if data.tiling.max_tiles > 1 else ''}"
        )
    return lost
