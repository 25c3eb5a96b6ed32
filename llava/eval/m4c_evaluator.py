"""Evaluators of TextVQA, ST-VQA and TextCaps at their published import path."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from llava.errors import DataError, DependencyError
from llava.eval.benchmarks.parsing import normalize, soft_accuracy
from llava.eval.run.files import Record

__all__ = [
    "EvalAIAnswerProcessor",
    "STVQAANLSEvaluator",
    "STVQAAccuracyEvaluator",
    "TextCapsBleu4Evaluator",
    "TextVQAAccuracyEvaluator",
]


class EvalAIAnswerProcessor:
    """`EvalAIAnswerProcessor()(text)` is `llava.eval.benchmarks.parsing.normalize(text)`."""

    def __call__(self, text: str) -> str:
        return normalize(text)


class Evaluator(ABC):
    """Mean of the scores of single answers."""

    @abstractmethod
    def score(self, answer: str, references: Sequence[str]) -> float:
        """Score of one answer from 0 to 1."""

    def eval_pred_list(self, pred_list: Sequence[Record]) -> float:
        """Mean score of `[{"pred_answer": str, "gt_answers": [str, …]}, …]`."""
        if not pred_list:
            raise DataError("There are no answers to score.")
        return sum(self.score(pair["pred_answer"], pair["gt_answers"]) for pair in pred_list) / len(pred_list)


class TextVQAAccuracyEvaluator(Evaluator):
    """Soft accuracy over the annotators."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        return soft_accuracy(answer, references)


class STVQAAccuracyEvaluator(Evaluator):
    """1 if the normalized answer equals any reference, else 0."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(normalize(answer) in map(normalize, references))


class STVQAANLSEvaluator(Evaluator):
    """Average normalized Levenshtein similarity to the best reference, 0 below one half (arXiv:1905.13648)."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        best = max(similarity(answer.lower().strip(), other.lower().strip()) for other in references)
        return best if best >= 0.5 else 0.0


def similarity(left: str, right: str) -> float:
    """1 - edit distance / longer length; 1 for two empty strings."""
    longer = max(len(left), len(right))
    return 1 - edit_distance(left, right) / longer if longer else 1.0


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


class TextCapsBleu4Evaluator:
    """Corpus BLEU-4 with the Penn Treebank tokenizer of pycocoevalcap, which needs Java."""

    def __init__(self) -> None:
        try:
            bleu = importlib.import_module("pycocoevalcap.bleu.bleu")
            tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer")
        except ImportError as error:
            raise DependencyError("BLEU-4 needs pycocoevalcap and Java: pip install pycocoevalcap") from error
        self._tokenize = tokenizer.PTBTokenizer().tokenize
        self._bleu = bleu.Bleu(4)

    def eval_pred_list(self, pred_list: Sequence[Record]) -> float:
        references = {n: [{"caption": text} for text in pair["gt_answers"]] for n, pair in enumerate(pred_list)}
        answers = {n: [{"caption": pair["pred_answer"]}] for n, pair in enumerate(pred_list)}
        scores, _ = self._bleu.compute_score(self._tokenize(references), self._tokenize(answers))
        return float(scores[3])
