"""Answer text questions with a language model without images, as a baseline.

    python -m llava.eval.model_qa --model-name MODEL --question-file tables/question.jsonl --answers-file answer.jsonl

Prompts use the default template with its example turns. Answers are sampled at temperature 0.7 with a fixed seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from llava.conversation import RenderedPrompt, default_conversation
from llava.errors import CheckpointError
from llava.eval.run.answers import answer_id
from llava.eval.run.files import Record, Row, read_rows, write_jsonl
from llava.mm_utils import KeywordsStoppingCriteria, encode_prompt
from llava.model.builder import load_pretrained_model, local_directory
from llava.model.checkpoint import Kind, inspect
from llava.model.tokenizer import load_tokenizer
from llava.placement import resolve_device
from llava.utils import guarded

TEMPERATURE = 0.7


def load(name: str, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of a directory or hub name, in float32 on CPU and float16 elsewhere."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    try:
        directory = local_directory(name)
        if inspect(directory).kind is Kind.LANGUAGE_MODEL:
            tokenizer, model, *_ = load_pretrained_model(directory, device=device, dtype=dtype, text_only=True)
            return tokenizer, model
        tokenizer = load_tokenizer(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype)
    except (OSError, ValueError, KeyError) as error:  # KeyError: a model type unknown to transformers
        raise CheckpointError(f"Cannot load a causal language model from {name} ({error}).") from error
    return tokenizer, model.to(device).eval()


@torch.inference_mode()
def answers(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    questions: Iterable[Record],
    model_id: str,
    max_new_tokens: int,
    seed: int,
) -> Iterator[Row]:
    """The published record of each question, without `prompt`."""
    torch.manual_seed(seed)
    for question in questions:
        conversation = default_conversation.copy()
        conversation.append_message(conversation.roles[0], question["text"])
        conversation.append_message(conversation.roles[1], None)
        prompt = conversation.get_prompt()  # whose template has no control tokens
        all_text = RenderedPrompt(prompt, [(0, len(prompt))])
        ids = torch.tensor([encode_prompt(all_text, tokenizer)], device=model.device)  # (1, T)
        stop = KeywordsStoppingCriteria([conversation.sep], tokenizer, ids)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE,
            max_new_tokens=max_new_tokens, stopping_criteria=StoppingCriteriaList([stop]),
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        text = text.partition(conversation.sep)[0].strip()
        identifier = answer_id(model_id, question["question_id"], question["text"], text)
        yield {"question_id": question["question_id"], "text": text, "answer_id": identifier, "model_id": model_id,
               "metadata": {}}  # fmt: skip


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", default="facebook/opt-350m", help="directory or hub name (default %(default)s)")
    parser.add_argument("--question-file", type=Path, default=Path("tables/question.jsonl"))
    parser.add_argument("--answers-file", type=Path, default=Path("answer.jsonl"))
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best available)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    questions = read_rows(args.question_file, "question_id", "text")
    tokenizer, model = load(args.model_name, resolve_device(args.device))
    rows = answers(tokenizer, model, questions, args.model_name, args.max_new_tokens, args.seed)
    write_jsonl(args.answers_file, list(tqdm(rows, total=len(questions), unit="question")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
