"""What the released Ristretto-3B is evaluated with, per benchmark.

Its model card evaluates with VLMEvalKit, where `vlmeval/vlm/ristretto.py` (open-compass/VLMEvalKit,
commit 03d0477) sets `max_num`, here max_tiles, and `num_image_token` by the benchmark's name. Left
side: lmms-eval's task, or what its variants begin with; comments: VLMEvalKit's name. It doubles the
first image of MMMU before it is cut, too, which is not done here.
"""

MAX_TILES = {
    "chartqa": 12,  # ChartQA_TEST
    "mmmu_val": 12,  # MMMU_DEV_VAL
    "mmmu_test": 12,  # MMMU_TEST
    "mmerealworld": 12,  # MME-RealWorld, MME-RealWorld-CN
    "vcr_wiki_en": 12,  # VCR_EN
    "vcr_wiki_zh": 12,  # VCR_ZH
    "docvqa_val": 18,  # DocVQA_VAL
    "docvqa_test": 18,  # DocVQA_TEST
    "infovqa_val": 24,  # InfoVQA_VAL
    "infovqa_test": 24,  # InfoVQA_TEST
    "ocrbench": 24,  # OCRBench
    "hrbench4k": 24,  # HRBench4K
    "hrbench8k": 24,  # HRBench8K
}
OTHER_MAX_TILES = 6

NUM_IMAGE_TOKENS = {
    "mmbench_en_dev": 144,  # MMBench_DEV_EN_V11; lmms-eval has the benchmark's first version
    "mathvista_testmini": 144,  # MathVista_MINI
    "mmvet": 144,  # MMVet
    "hallusion_bench_image": 576,  # HallusionBench
}
OTHER_NUM_IMAGE_TOKENS = 256


def released_max_tiles(task: str) -> int:
    """Tiles of an image at most, its thumbnail not counted."""
    return _of_task(MAX_TILES, task, OTHER_MAX_TILES)


def released_num_image_tokens(task: str) -> int:
    """Tokens of a tile."""
    return _of_task(NUM_IMAGE_TOKENS, task, OTHER_NUM_IMAGE_TOKENS)


def _of_task(table: dict[str, int], task: str, other: int) -> int:
    return next((n for name, n in table.items() if f"{task}_".startswith(f"{name}_")), other)
