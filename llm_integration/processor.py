"""The stock LLaVA processor, set so that a picture of any size becomes exactly N image tokens."""

from __future__ import annotations

from os import PathLike
from typing import Any

from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sparse_vlm import TransformConfig
from sparse_vlm.preprocessor import is_exact, to_preprocessor_dict

from .templates import IMAGE_MARK

# The processor counts patches along each edge; no picture has one patch of this many pixels.
_NO_PATCHES = 1 << 20


def build_processor(
    transform: TransformConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    chat_template: str,
    drops_first: bool = False,
    pads: bool = False,
) -> LlavaProcessor:
    """A processor for an encoder and a tokenizer that already knows the image token.

    Args:
        transform: the encoder's image transform.
        tokenizer: the language model's tokenizer.
        num_tokens: tokens that the encoder makes of a picture.
        chat_template: Jinja text.
        drops_first: whether LLaVA drops the first of them (feature select strategy "default").
        pads: make pictures square with bars in the mean colour before the transform, as the llava package's
            ``image_aspect_ratio`` "pad" does; otherwise the transform crops their middle.

    Raises:
        ValueError: if transformers' image processors cannot follow the transform.
    """
    if not is_exact(transform):
        raise ValueError(
            f"the encoder's transform covers a picture of {transform.height} x {transform.width} pixels, "
            "which transformers' image processors cannot do: they cover squares only"
        )
    # Answers of a batch begin where its rows end; training pads by itself.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # of the latter it is saved
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = None  # several by name would be written beside ours, and read in its place
    fields = to_preprocessor_dict(transform)
    del fields["image_processor_type"]
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(do_pad=True, **fields)
        if pads
        else CLIPImageProcessorPil(**fields),
        tokenizer=tokenizer,
        patch_size=_NO_PATCHES,
        num_additional_image_tokens=num_tokens,
        vision_feature_select_strategy="default" if drops_first else "full",
        image_token=IMAGE_MARK,
        chat_template=chat_template,
    )


def load_processor(directory: str | PathLike[str]) -> LlavaProcessor:
    """Read a model directory's processor, with the image backend whose bits equal the encoder's transform.

    Raises:
        ValueError: if the directory holds another kind of processor.
    """
    # transformers prefers torchvision where it is installed; its resizing differs by up to 0.015.
    processor = AutoProcessor.from_pretrained(str(directory), backend="pil", local_files_only=True)
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(f"{directory} holds a {type(processor).__name__}, expected a LlavaProcessor")
    ensure_padding(processor.tokenizer)
    return processor


def ensure_padding(tokenizer: Any) -> None:
    """Give a tokenizer that names no token to pad with one that it has."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def count_image_tokens(processor: LlavaProcessor) -> int:
    """Image tokens the processor writes for a picture, whatever its size."""
    dropped = int(processor.vision_feature_select_strategy == "default")
    height, width = measure_pictures(processor)
    # A SparseFormer's processor names patches larger than any picture: all its tokens are additional ones.
    patches = (height // int(processor.patch_size)) * (width // int(processor.patch_size))
    return patches + int(processor.num_additional_image_tokens) - dropped


def measure_pictures(processor: LlavaProcessor) -> tuple[int, int]:
    """Height and width in pixels of what the tower gets to see."""
    images: Any = processor.image_processor
    size = images.crop_size if images.do_center_crop else images.size
    height, width = (int(size[side] or size["shortest_edge"]) for side in ("height", "width"))
    return height, width


def pads_pictures(processor: Any) -> bool:
    """Whether a processor makes pictures square with bars before anything else."""
    return bool(getattr(processor.image_processor, "do_pad", False))


def pad_square(picture: Image.Image, processor: Any) -> Image.Image:
    """A picture as a processor that pads sees it: square, the bars in the mean colour, RGB."""
    edge, colour = (
        max(picture.size),
        tuple(int(value * 255) for value in processor.image_processor.image_mean),
    )
    padded = Image.new("RGB", (edge, edge), colour)
    padded.paste(picture.convert("RGB"), ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return padded
