"""Build a LLaVA from an encoder directory and a language model.

``python -m llm_integration.assemble --encoder ENCODER_DIR --llm LLM_DIR --out OUT_DIR``

The result is a plain transformers directory: ``AutoModelForImageTextToText`` and ``AutoProcessor`` read it
once ``llm_integration.hf`` is imported. Its projector is untrained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sparse_vlm import SparseFormer, TransformConfig, load_encoder
from sparse_vlm.atomic import atomic_directory
from sparse_vlm.checkpoint import load_provenance
from sparse_vlm.fingerprint import hash_tensors

from .clip_vision import count_patches, load_clip_vision
from .decoding import drop_idle, keep_silent
from .hf import build_vision_model
from .load import check_known, read_json
from .processor import build_processor, ensure_padding
from .room import count_positions
from .templates import CHATML_TOKENS, IMAGE_MARK, TEMPLATES, add_end, build_template, find_stop

ASSEMBLY_FILE = "assembly.json"
RUN_FILE = "run.json"
OWNED = (
    *("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.py"),
    *("README.md", "LICENSE"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_llm(name: str) -> tuple[str, bool]:
    """Where a language model comes from: (path or hub name, whether only local files are to be used).

    Raises:
        ValueError: for a plain name that is not a directory, with both right spellings.
    """
    if name.startswith("hf:"):
        return name.removeprefix("hf:"), False
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"--llm {name}: there is no model directory of that name (a folder with config.json); for a "
            f"model from the Hugging Face hub write --llm hf:{name}"
        )
    return name, True


def load_llm(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a local directory, or ``hf:NAME``.
        dtype: precision; None keeps the checkpoint's.

    Raises:
        ValueError: if it is another kind of model.
    """
    source, local = resolve_llm(name)
    if local:
        check_known(Path(source))
    config = AutoConfig.from_pretrained(source, local_files_only=local)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} holds a {config.model_type!r} model, expected a language model alone; to exchange the "
            "tower of a LLaVA there is python -m llm_integration.swap"
        )
    llm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", local_files_only=local)
    # A bare SentencePiece file says nothing about how it is used; Llama's own code puts BOS first.
    bare = (Path(source) / "tokenizer.model").is_file() and not any(Path(source).glob("tokenizer*.json"))
    extra = {"add_bos_token": True} if bare else {}
    return llm.eval(), AutoTokenizer.from_pretrained(source, local_files_only=local, **extra)


class Tower(NamedTuple):
    """A vision tower, and how LLaVA is to read it.

    Attributes:
        model: of transformers; width and layers are in its config.
        tokens: it makes of a picture, the class token included.
        layer: the hidden state that LLaVA reads; -1 is the last one.
        drops_first: whether LLaVA leaves out the first token (select strategy "default").
        transform: from picture to pixels.
    """

    model: Any
    tokens: int
    layer: int
    drops_first: bool
    transform: TransformConfig


def build_llava(
    encoder: SparseFormer,
    llm: Any,
    tokenizer: Any,
    num_tokens: int | None = None,
    template: str | None = None,
    pads: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put encoder, a fresh projector and language model together; the parts' weights are shared, not copied.

    Args:
        encoder: the vision encoder.
        llm: any causal language model of transformers.
        tokenizer: its tokenizer; the image token is added to it.
        num_tokens: visual tokens per picture; by default the encoder's.
        template: chat template: "own", "vicuna_v1", "chatml" or "plain"; by default the tokenizer's own where
            it has one, and "vicuna_v1" otherwise.
        pads: see :func:`llm_integration.processor.build_processor`.

    Raises:
        ValueError: if the parts do not fit each other.
    """
    model = build_vision_model(encoder, num_tokens, pooling_head=False)
    tower = Tower(model, model.config.num_tokens, -1, False, encoder.transform.config)
    return join_parts(tower, llm, tokenizer, template, pads)


def build_vit_llava(
    directory: str | Path, llm: Any, tokenizer: Any, template: str | None = None, pads: bool = False
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same with a whole CLIP ViT, read as LLaVA 1.5 does: the patch tokens before the last block.

    Args:
        directory: see :func:`llm_integration.clip_vision.load_clip_vision`.
        llm: any causal language model of transformers.
        tokenizer: its tokenizer; the image token is added to it.
        template: see :func:`build_llava`.
        pads: see :func:`llm_integration.processor.build_processor`.

    Raises:
        ValueError: if the parts do not fit each other.
    """
    model, transform = load_clip_vision(directory)
    tower = Tower(model, count_patches(model) + 1, -2, True, transform)
    return join_parts(tower, llm, tokenizer, template, pads)


def warn_of_count(encoder: Path, wanted: int, own: int) -> None:
    """Say on the error output that an encoder was not bootstrapped with a token count.

    Args:
        encoder: the encoder directory, whose provenance lists the counts; one that lists none is taken to
            have been bootstrapped with its own.
        wanted: visual tokens per picture, class token included.
        own: the encoder's own count.
    """
    config = load_provenance(encoder).get("config")
    student = config.get("student") if isinstance(config, Mapping) else None
    listed = student.get("token_counts") if isinstance(student, Mapping) else None
    counts = sorted(set(listed or ())) or [own]
    if wanted not in counts:
        print(
            f"warning: {encoder} was bootstrapped with {' and '.join(map(str, counts))} tokens; what it sees "
            f"with {wanted} is worth measuring first",
            file=sys.stderr,
        )


def join_parts(
    tower: Tower, llm: Any, tokenizer: Any, template: str | None = None, pads: bool = False
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Tower, a fresh projector and language model as one; see :func:`build_llava`."""
    template = template or ("own" if tokenizer.chat_template else "vicuna_v1")
    jinja = build_template(template, tokenizer.chat_template)
    visual = tower.tokens - tower.drops_first
    positions = count_positions(llm.config.get_text_config())
    if positions is not None and visual >= positions:
        raise ValueError(
            f"{visual} visual tokens leave no room for words in the language model's {positions} positions"
        )
    probe = torch.arange(min(8, int(llm.get_input_embeddings().weight.shape[0])))[None]
    with torch.no_grad():
        # Of the words it knows: the tokens to come may take rows that it keeps free behind them.
        before = llm(input_ids=probe).logits[..., : len(tokenizer)]
    added = [IMAGE_MARK, *(CHATML_TOKENS if template == "chatml" else ())]
    image_token = add_tokens(llm, tokenizer, added)
    ensure_padding(tokenizer)

    text_config = llm.config.get_text_config()
    config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=text_config,
        image_token_index=image_token,
        image_seq_length=visual,
        vision_feature_layer=tower.layer,
        vision_feature_select_strategy="default" if tower.drops_first else "full",
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
        dtype=llm.dtype,
    )
    body = llm.base_model
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
    except AttributeError as error:  # it ties embed_tokens, which this body has not
        raise ValueError(f"LLaVA cannot hold a {type(body).__name__}: {error}") from None
    if type(model.model.language_model) is not type(body):
        raise ValueError(
            f"transformers would build a {type(model.model.language_model).__name__} from this language "
            f"model's configuration, but its body is a {type(body).__name__}; LLaVA cannot hold it"
        )
    model.model.vision_tower = tower.model.to(llm.dtype)
    model.model.multi_modal_projector = build_projector(config).to(llm.dtype)
    model.model.language_model = body
    model.lm_head = _take_head(llm)
    model.generation_config = build_generation_config(llm, tokenizer, image_token, jinja)
    model.eval()
    _check_unchanged(model, probe, before)
    processor = build_processor(tower.transform, tokenizer, tower.tokens, jinja, tower.drops_first, pads)
    return model, processor


def _take_head(llm: Any) -> nn.Module:
    """The output layer, which has no bias in a LLaVA.

    Raises:
        ValueError: if this one has.
    """
    head: Any = llm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        if head.bias.count_nonzero():
            raise ValueError(
                f"the output layer of this {type(llm).__name__} has a bias, and that of a LLaVA has none"
            )
        head.bias = None
    return cast("nn.Module", head)


def build_projector(config: LlavaConfig) -> LlavaMultiModalProjector:
    """A freshly initialised projector of the size that a configuration asks for."""
    projector = LlavaMultiModalProjector(config)
    std = getattr(config.text_config, "initializer_range", None) or 0.02
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return projector


@torch.no_grad()
def add_tokens(llm: Any, tokenizer: Any, tokens: Sequence[str]) -> int:
    """Add special tokens, with the mean of all embeddings as theirs, and return the id of the first.

    Rows that a language model keeps free behind its vocabulary are used before the tables grow.
    """
    vocabulary = tokenizer.get_vocab()
    fresh = [token for token in tokens if token not in vocabulary]
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": fresh}, replace_extra_special_tokens=False)
    if len(tokenizer) > llm.get_input_embeddings().weight.shape[0]:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers: tuple[Any, Any] = (llm.get_input_embeddings(), llm.get_output_embeddings())
    tables = {id(layer.weight): layer.weight for layer in layers}
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in fresh]
    for table in tables.values():
        mean = table[: min(known, table.shape[0])].float().mean(dim=0).to(table.dtype)
        for index in ids:
            table[index] = mean
    return int(tokenizer.convert_tokens_to_ids(tokens[0]))


def build_generation_config(llm: Any, tokenizer: Any, image_token: int, jinja: str) -> GenerationConfig:
    """The language model's own settings, never to write an image token, and to stop as the template does."""
    settings: GenerationConfig = llm.generation_config
    drop_idle(settings)
    keep_silent(settings, image_token)
    settings.pad_token_id = tokenizer.pad_token_id
    ends = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    listed = list(ends) if isinstance(ends, (list, tuple)) else [ends] if ends is not None else []
    settings.eos_token_id = sorted(set(listed)) or None
    add_end(settings, find_stop(tokenizer, jinja))
    return settings


@torch.no_grad()
def _check_unchanged(model: LlavaForConditionalGeneration, probe: Tensor, before: Tensor) -> None:
    """Text alone must come out as the language model itself says it (some scale or cap their logits)."""
    after = model(input_ids=probe.to(model.device)).logits[..., : before.shape[-1]]
    tolerance = 1e-3 if before.dtype == torch.float32 else 3e-2
    if torch.allclose(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max())):
        return
    if torch.equal(after.argmax(-1), before.argmax(-1)):
        print(
            "warning: this language model rescales or caps its logits and LLaVA does not: greedy answers "
            "are the same, sampled ones are drawn from a sharper distribution",
            file=sys.stderr,
        )
        return
    raise ValueError(
        "inside LLaVA this language model gives other answers to plain text than by itself, so LLaVA does "
        f"not fit it ({type(model.model.language_model).__name__})"
    )


Kind = Literal["assembled", "exported", "trained"]
_KINDS: tuple[Kind, ...] = ("assembled", "exported", "trained")


def check_place(out: Path, *sources: Path, over: Kind = "assembled") -> None:
    """See that nothing is lost if a model is written to a place: only an earlier one of ours is replaced.

    Args:
        out: where to.
        sources: directories that the model is made of.
        over: what may be replaced: a model that was only ``"assembled"``, also one that was ``"exported"``
            from a training's result, or also a ``"trained"`` result itself.

    Raises:
        FileExistsError: if the place holds something else, or a training's result.
        ValueError: if it is a source, or its ``assembly.json`` is damaged.
    """
    if any(out.resolve() == source.resolve() for source in sources):
        raise ValueError(f"{out} is what the model is made of and would be lost: name another directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not any((out / name).is_file() for name in (ASSEMBLY_FILE, RUN_FILE)):
        listed = ", ".join(sorted(entry.name for entry in out.iterdir())[:5])
        raise FileExistsError(
            f"{out} holds no model of ours, and other files ({listed}) would be lost: name another directory"
        )
    if _KINDS.index(_kind_of(out)) > _KINDS.index(over):
        raise FileExistsError(
            f"{out} holds what a run of llm_integration.train has trained, which would be lost: name another "
            "directory"
        )


def _kind_of(directory: Path) -> Kind:
    """What a model of ours in a directory is."""
    if (directory / RUN_FILE).is_file():
        return "trained"
    facts = read_json(directory / ASSEMBLY_FILE)
    if "steps" not in facts:
        return "assembled"
    return "exported" if "base" in facts else "trained"  # a run that trains everything leaves a plain LLaVA


def save_llava(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    out: Path,
    facts: dict[str, Any],
    over: Kind = "assembled",
) -> None:
    """Write a plain LLaVA directory, atomically, with what is known about its parts in ``assembly.json``.

    Args:
        model: what to write.
        processor: its processor.
        out: where to.
        facts: about its parts.
        over: see :func:`check_place`.
    """
    check_place(out, over=over)
    tower = hash_tensors(model.model.vision_tower.state_dict())
    with atomic_directory(out, owned=OWNED) as folder:
        # Whoever reads it without this package is to stop where the template does, too.
        jinja: Any = processor.chat_template
        add_end(model.generation_config, find_stop(processor.tokenizer, jinja))
        drop_idle(model.generation_config)
        keep_silent(model.generation_config, model.config.image_token_id)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        text = json.dumps({**facts, "tower_sha256": tower}, indent=2) + "\n"
        (folder / ASSEMBLY_FILE).write_text(text, encoding="utf-8")


def assemble(
    encoder_directory: Path | None,
    llm_name: str,
    out: Path,
    num_tokens: int | None = None,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    vit: Path | None = None,
    pads: bool = False,
) -> None:
    """Read an encoder directory (or a whole CLIP ViT) and a language model, and write a LLaVA directory.

    Args:
        encoder_directory: the encoder; None for a ViT.
        llm_name: a local directory, or ``hf:NAME``.
        out: where to write.
        num_tokens: visual tokens per picture; by default the encoder's.
        template: see :func:`build_llava`.
        dtype: precision of the whole; by default the language model's.
        seed: of the projector's initial weights.
        vit: directory of a CLIP, in the encoder's place.
        pads: see :func:`llm_integration.processor.build_processor`.

    Raises:
        ValueError: if the parts do not fit each other, or not one of encoder and ViT is given.
    """
    check_place(out)
    if (encoder_directory is None) == (vit is None):
        raise ValueError("name either an encoder directory or a ViT")
    if vit is not None and num_tokens is not None:
        raise ValueError("a ViT makes as many tokens as it has patches; num_tokens is for encoders")
    llm, tokenizer = load_llm(llm_name, dtype)
    facts: dict[str, Any] = {}
    if encoder_directory is not None:
        encoder = load_encoder(encoder_directory)
        torch.manual_seed(seed)
        warn_of_count(encoder_directory, num_tokens or encoder.config.num_tokens, encoder.config.num_tokens)
        model, processor = build_llava(encoder, llm, tokenizer, num_tokens, template, pads)
        facts["encoder"] = str(Path(encoder_directory).resolve())
        facts["encoder_provenance"] = load_provenance(encoder_directory)
    elif vit is not None:
        torch.manual_seed(seed)
        model, processor = build_vit_llava(vit, llm, tokenizer, template, pads)
        facts["vit"] = str(vit.resolve())
    facts |= {
        "llm": llm_name,
        "num_tokens": model.config.image_seq_length,
        "projector": f"initialised, not trained (seed {seed})",
    }
    save_llava(model, processor, out, facts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llm_integration.assemble", description=__doc__)
    eyes = parser.add_mutually_exclusive_group(required=True)
    eyes.add_argument("--encoder", type=Path, help="encoder directory")
    eyes.add_argument(
        "--vit", type=Path, help="directory of a CLIP (transformers or open_clip), for comparison"
    )
    parser.add_argument("--llm", required=True, help="directory of a causal language model, or hf:NAME")
    parser.add_argument("--out", type=Path, required=True, help="LLaVA directory to write")
    parser.add_argument("--num-tokens", type=int, help="visual tokens per picture (default: the encoder's)")
    parser.add_argument("--template", choices=["own", *TEMPLATES], help="chat template")
    parser.add_argument("--dtype", choices=list(DTYPES), help="precision (default: the language model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    parser.add_argument(
        "--pad",
        action="store_true",
        help="make pictures square with bars, as LLaVA's --image_aspect_ratio pad does, instead of cropping "
        "their middle",
    )
    options = parser.parse_args(arguments)
    try:
        assemble(
            options.encoder,
            options.llm,
            options.out,
            options.num_tokens,
            options.template,
            DTYPES[options.dtype] if options.dtype else None,
            options.seed,
            options.vit,
            options.pad,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.out}: import llm_integration.hf, then AutoModelForImageTextToText reads it")


if __name__ == "__main__":
    main()
