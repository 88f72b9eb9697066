"""The keys of records as people have them, by what they carry.

A key that carries content is read or refused by name; any other key is kept as metadata. Names are
compared without regard to case. Sources: the data formats of LLaVA, LLaVA-NeXT, InternVL, Qwen-VL,
ms-swift, LLaMA-Factory, TRL, FineVision, The Cauldron, VQAv2, ImageFolder (Hugging Face datasets).
"""

from data_pipeline.images import IMAGE_SUFFIXES

TURNS = ("messages", "conversations", "conversation", "texts")
QUESTION = ("question", "questions", "query", "prompt", "instruction", "problem")
ANSWER = ("answer", "response", "output", "completion", "solution", "multiple_choice_answer")
ANSWERS = ("answers",)
CHOICES = ("choices", "options")
CAPTION = ("caption", "text", "caption_str")
MORE_QUESTION = ("input",)
"""Alpaca's second half of an instruction."""

SYSTEM = ("system", "system_prompt")
IMAGES = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "img", "imgs"),
    *("image_url", "image_urls", "img_path", "picture", "pictures", "photo", "file_name"),
)

ALIKE = (TURNS, QUESTION, (*ANSWER, *ANSWERS), CHOICES, CAPTION, SYSTEM, IMAGES)
"""Keys for the same: where --map says which of them is meant, the others are metadata."""

MEDIA = (
    *("video", "videos", "video_path", "video_paths", "video_url", "video_file", "clip", "clips"),
    *("audio", "audios", "audio_path", "audio_paths", "audio_url", "audio_file", "sound", "sounds"),
    *("speech", "wav", "point_cloud", "pointcloud", "frames"),
)
"""Media that the model cannot take."""
UNREAD = (
    *("tools", "functions", "tool_calls", "function_call", "history", "chosen", "rejected"),
    *("rejected_response", "rejected_messages", "rejected_images", "reasoning_content"),
    *("thinking", "prefix", "suffix", "context", "passage", "hint"),
)
"""Texts that other trainers put into the prompt or learn from, and this one does not."""
LOSS = ("weight", "loss", "loss_weight", "train", "trainable", "loss_mask", "loss_scale")
"""What other trainers take as a switch or weight of the loss; anything but on is refused."""

ROLE = ("role", "from", "speaker")
CONTENT = ("content", "value", "text")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}

MEDIA_SUFFIXES = (
    *(*sorted(IMAGE_SUFFIXES), ".heic", ".heif", ".jxl", ".svg", ".pdf"),
    *(".ico", ".tga", ".psd", ".pcx", ".exr", ".dng", ".icns", ".qoi"),
    *(".mp4", ".avi", ".mkv", ".mov", ".webm", ".wav", ".mp3", ".flac", ".ogg", ".m4a"),
)
"""A value that ends in one of these names a media file, whatever its key."""
