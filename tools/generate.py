"""`opencoder generate`: text from a native or Hugging Face checkpoint, by transformers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencoder.console import Parser, run
from opencoder.errors import DataError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the prompt with its continuation."""
    parser = Parser("generate", "Generate text from a checkpoint.")
    parser.add_argument("--model", required=True, help="native checkpoint, run folder, or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total share")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--chat", action="store_true", help="treat the prompt as a user's turn of the chat template")
    args = parser.parse_args(argv)
    folder = Path(args.model)
    if not folder.is_dir():
        raise UserError(f"--model {folder} is not a folder")

    import torch

    from opencoder.checkpoint import folders, hf
    from opencoder.checkpoint.hf_config import check_ids

    torch.manual_seed(args.seed)
    if hf.is_hf_folder(folder):
        from transformers import AutoModelForCausalLM

        check_ids(folder)
        model, tokenizer_folder = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), folder
    else:
        model, tokenizer_folder = hf.to_transformers(folder), folders.resolve(folder) / "tokenizer"
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} carries no tokenizer: train with data.tokenizer set, or copy tokenizer.json there")
    print(continue_text(model, tokenizer_folder, args.prompt, args))
    return 0


def continue_text(model: Any, tokenizer_folder: Path, prompt: str, args: argparse.Namespace) -> str:
    """The prompt and its continuation as text."""
    import torch
    from transformers import AutoTokenizer

    from opencoder.data.chat_prompt import prompt_ids
    from opencoder.data.tokenizer import TURN_END

    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    stops: dict[str, Any] = {}
    if args.chat:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        # An answer ends with its turn, as well as with the document.
        ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get(TURN_END)} - {None}
        stops["eos_token_id"] = sorted(ends)
    else:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids])
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.temperature > 0 else {}
    output = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        **stops,
        **sampling,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    run(main)
