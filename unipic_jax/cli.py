"""The `unipic` command: parse, call, print."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from unipic_jax import cli_plan, cli_rewards, cli_train
from unipic_jax.core.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, or 2 after a line that says what was wrong with the input."""
    try:
        parser = build_parser()
        args, rest = parser.parse_known_args(argv)
        if rest and args.run not in (*cli_train.TAKE_FIELDS, cli_plan.plan):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
        return args.run(args) or 0
    except InputError as e:
        print(f"unipic: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unipic: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """What reads the command line of every command; it raises InputError for what it cannot."""
    parser = _Parser(prog="unipic", description="Skywork UniPic 2.0 in JAX")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    sub = command("generate", _generate, "Draw pictures from text.")
    sub.add_argument("--prompt", required=True, action="append",
                     help="what to draw; several are drawn as one batch")
    sub.add_argument("--negative-prompt", default="", help="what to steer away from")
    sub.add_argument("--height", type=int, default=512, help="pixels")
    sub.add_argument("--width", type=int, default=384, help="pixels")
    _drawing(sub)

    sub = command("edit", _edit, "Edit a picture as a prompt says.")
    sub.add_argument("--prompt", required=True, action="append",
                     help="the instruction; several are followed in turn, each on the picture that "
                     "the one before has made")
    sub.add_argument("--image", required=True, type=Path, help="the picture to edit")
    sub.add_argument("--negative-prompt", help="what to steer away from (default: the release's "
                     "list of flaws)", default=argparse.SUPPRESS)
    sub.add_argument("--image-size", type=int, default=512, help="pixels of the longer side")
    sub.add_argument("--sample-reference", action="store_true",
                     help="sample the autoencoder's posterior instead of taking its mode")
    sub.add_argument("--reference-noise", type=Path, metavar="F.npy",
                     help="standard normal [1, C, h, w] to sample the posterior with")
    sub.add_argument("--skip-forgets-reference", action="store_true",
                     help="skip-layer guidance without the reference, as the released code has it")
    sub.add_argument("--image-guidance-scale", type=float, default=argparse.SUPPRESS,
                     help="guide by the picture too, apart from the text (default: off)")
    sub.add_argument("--three-axis-rope", action="store_true",
                     help="MetaQuery: the picture's rows and columns in the language model's "
                     "positions, which the released code leaves out")
    sub.add_argument("--newline-after-picture", action="store_true",
                     help="MetaQuery: a newline between the picture and the instruction")
    _drawing(sub)

    sub = command("describe", _describe, "Answer questions about pictures.")
    sub.add_argument("--mllm", required=True, help="a folder of Qwen2.5-VL in the released or the "
                     "JAX layout, or hf://owner/name")
    sub.add_argument("--image", type=Path, action="append", default=[],
                     help="the picture; several are shown in order")
    sub.add_argument("--prompt", required=True, action="append",
                     help="the question; several are a conversation")
    sub.add_argument("--max-pixels", type=int, default=argparse.SUPPRESS, help="shrink pictures "
                     "that have more (default: as preprocessor_config.json has it)")
    sub.add_argument("--max-new-tokens", type=int, default=512, help="of an answer")
    sub.add_argument("--temperature", type=float, default=0.0,
                     help="of the draw of each token; at 0 the likeliest is taken")
    sub.add_argument("--top-p", type=float, default=1.0,
                     help="draw from the likeliest tokens that come to this probability")
    sub.add_argument("--repetition-penalty", type=float, default=argparse.SUPPRESS,
                     help="above 1 against repetition (default: as generation_config.json has it)")
    sub.add_argument("--seed", type=int, default=42)
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), default=argparse.SUPPRESS,
                     help="(default: bfloat16, on a CPU float32)")
    sub.add_argument("--save-tokens", type=Path, metavar="F.json",
                     help="write the token ids of the last answer")

    cli_train.add(command)
    cli_plan.add(command)
    cli_rewards.add(command)

    for name, run, text in (("convert", _convert, "A released PyTorch folder to the JAX layout."),
                            ("export", _export, "A folder in the JAX layout to the released one.")):
        sub = command(name, run, text)
        sub.add_argument("--from", dest="source", required=True, metavar="DIR")
        sub.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR",
                         help="a new folder; it appears when all is written")
        if name == "export":
            sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                             default=argparse.SUPPRESS, help="of the weights (default: as stored)")
    return parser


def _drawing(sub):
    sub.add_argument("--model", required=True,
                     help="a folder in the released or the JAX layout, hf://owner/name, or one "
                     "of the small ones that are shipped, nano and nano-metaquery")
    sub.add_argument("--mllm", metavar="DIR", help="Qwen2.5-VL, named as the model is, or "
                     "nano-qwen2.5-vl: draw by MetaQuery")
    sub.add_argument("--conditioner", metavar="DIR",
                     help="the folder of MetaQuery's conditioner, where it is not in the model's")
    sub.add_argument("--steps", type=int, default=50, help="denoising steps")
    sub.add_argument("--guidance-scale", type=float, default=3.5, help="off at 1 and below")
    sub.add_argument("--seed", type=int, default=42)
    sub.add_argument("--images-per-prompt", type=int, default=1)
    sub.add_argument("--skip-layers", type=int, nargs="+", default=(), metavar="LAYER",
                     help="skip-layer guidance with these blocks (7 8 9 for SD3.5-Medium)")
    sub.add_argument("--skip-scale", type=float, default=2.8, help="its weight")
    sub.add_argument("--skip-start", type=float, default=0.01, help="its first part of the steps")
    sub.add_argument("--skip-stop", type=float, default=0.2, help="its last part of the steps")
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), default=argparse.SUPPRESS,
                     help="of everything but the autoencoder (default: bfloat16, on a CPU float32)")
    sub.add_argument("--vae-dtype", choices=("bfloat16", "float32"), default="float32")
    sub.add_argument("--latents", type=Path, metavar="F.npy",
                     help="standard normal [B, C, h, w] to begin with, in place of the seed's")
    sub.add_argument("--save-latents", type=Path, metavar="F.npy",
                     help="write the final latents [B, C, h, w]")
    sub.add_argument("--output", required=True, type=Path, metavar="F.png",
                     help="the picture; several become F-0.png, F-1.png, ...")


def _options(args):
    import jax.numpy as jnp

    from unipic_jax.core.files import check_writable
    from unipic_jax.core.images import check_output
    from unipic_jax.flow.guidance import SkipLayer
    from unipic_jax.pipelines.generate import Options

    for name in ("steps", "images_per_prompt"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    check_output(args.output)
    if args.save_latents:
        check_writable(args.save_latents)
    dtype = _start(args)
    return Options(
        steps=args.steps, guidance_scale=args.guidance_scale, seed=args.seed,
        images_per_prompt=args.images_per_prompt,
        skip=SkipLayer(tuple(args.skip_layers), args.skip_scale, args.skip_start, args.skip_stop)
        if args.skip_layers else None,
        image_guidance_scale=getattr(args, "image_guidance_scale", None),
        **{name: getattr(args, name, False) for name in (
            "skip_forgets_reference", "three_axis_rope", "newline_after_picture")},
        dtype=dtype, vae_dtype=jnp.dtype(args.vae_dtype), progress=True)


def _start(args):
    """The type to compute in, after the checks that all commands share."""
    import jax
    import jax.numpy as jnp

    if not 0 <= args.seed < 2**31:
        raise InputError("--seed must lie between 0 and 2147483647")
    keep_programs()
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(getattr(args, "dtype", default))


def keep_programs():
    """Programs compiled once are found again by the next run."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "unipic_jax"))


def _array(path: Path | None) -> np.ndarray | None:
    """A channels-first `.npy` of latents, channels last."""
    if path is None:
        return None
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{path} cannot be read as an array: {e}") from None
    if not (isinstance(array, np.ndarray) and array.ndim == 4
            and np.issubdtype(array.dtype, np.floating)):
        raise InputError(f"{path} must hold floats of shape [B, C, h, w]")
    return np.moveaxis(array.astype(np.float32), 1, -1)


def _model(args):
    from unipic_jax.convert import load
    from unipic_jax.pipelines import generate

    return generate.open_model(*(name and load.find(name) for name in (
        args.model, args.mllm, args.conditioner)))


def _generate(args):
    options, latents = _options(args), _array(args.latents)
    from unipic_jax.pipelines import generate

    parts = _model(args)
    drawn = generate.generate(parts, args.prompt, args.negative_prompt, height=args.height,
                              width=args.width, latents=latents, options=options)
    _write(args, drawn)


def _edit(args):
    options, latents, noise = _options(args), _array(args.latents), _array(args.reference_noise)
    from unipic_jax.core.images import open_picture
    from unipic_jax.pipelines import edit

    for name in ("three_axis_rope", "newline_after_picture"):
        if getattr(args, name) and not args.mllm:
            raise InputError(f"--{name.replace('_', '-')} is for MetaQuery; give --mllm")
    picture = open_picture(args.image)
    how = dict(negative_prompt=getattr(args, "negative_prompt", edit.NEGATIVE_PROMPT),
               image_size=args.image_size, latents=latents, reference_noise=noise,
               sample_reference=args.sample_reference, options=options)
    if len(args.prompt) == 1:
        drawn = edit.edit(_model(args), [picture], args.prompt, **how)
    else:
        drawn = edit.edit_in_turns(_model(args), picture, args.prompt, **how)
    _write(args, drawn)


def _describe(args):
    dtype = _start(args)
    from unipic_jax.conditioning import qwen_chat
    from unipic_jax.convert import load
    from unipic_jax.core import files, images
    from unipic_jax.pipelines import describe

    options = describe.Options(
        args.max_new_tokens, args.temperature, args.top_p,
        getattr(args, "repetition_penalty", None), args.seed, dtype)
    if args.save_tokens:
        files.check_writable(args.save_tokens)
    shown = [{"type": "image", "image": images.open_picture(path)} for path in args.image]
    part = describe.open_model(load.find(args.mllm))
    chat = qwen_chat.open_chat(part.folder)
    if hasattr(args, "max_pixels"):
        chat = qwen_chat.limited(chat, args.max_pixels)
    params = load.read(part, dtype)
    messages = []
    for prompt in args.prompt:
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": prompt}]})
        shown = []  # they are in the conversation now
        display = _Display()
        answer, = describe.describe(chat, part.config, params, [messages], options, display.show)
        display.close(answer)
        messages.append({"role": "assistant", "content": answer.text})
    if args.save_tokens:
        with files.new_file(args.save_tokens) as partial:
            partial.write_text(json.dumps(answer.tokens), encoding="utf-8")


class _Display:
    """Prints an answer as it grows, and at its end how fast it did."""

    def __init__(self):
        self.printed, self.began = 0, None

    def show(self, answers):
        self.began = self.began or (time.perf_counter(), len(answers[0].tokens))
        text = answers[0].text.rstrip("\N{REPLACEMENT CHARACTER}")  # may be half a character yet
        print(text[self.printed:], end="", flush=True)
        self.printed = max(self.printed, len(text))

    def close(self, answer):
        print(answer.text[self.printed:])
        began, before = self.began
        n, seconds = len(answer.tokens), time.perf_counter() - began
        speed = f", {(n - before) / seconds:.3g} tokens a second" if n > before else ""
        print(f"{n} tokens{speed}", file=sys.stderr)


def _write(args, drawn):
    from unipic_jax.core import files, images

    if args.save_latents:
        with files.new_file(args.save_latents) as partial, open(partial, "wb") as f:
            np.save(f, np.moveaxis(drawn.latents, -1, 1))
    for i, picture in enumerate(drawn.pictures):
        path = args.output
        if len(drawn.pictures) > 1:
            path = path.with_stem(f"{path.stem}-{i}")
        images.save(images.to_picture(picture), path)
        print(f"{path}: {picture.shape[1]}x{picture.shape[0]}")


def _convert(args):
    from unipic_jax.convert import convert, load

    for part in convert.convert(load.find(args.source), args.target):
        print(part)


def _export(args):
    from unipic_jax.convert import convert, load

    dtype = getattr(args, "dtype", None)
    for part in convert.export(load.find(args.source), args.target, dtype=dtype):
        print(part)
