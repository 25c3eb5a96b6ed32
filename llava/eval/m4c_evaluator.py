"""The published import path of `llava.eval.scorers.scene_text`."""

from llava.eval.scorers.scene_text import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextCapsBleu4Evaluator,
    TextVQAAccuracyEvaluator,
)

__all__ = [
    "EvalAIAnswerProcessor",
    "STVQAANLSEvaluator",
    "STVQAAccuracyEvaluator",
    "TextCapsBleu4Evaluator",
    "TextVQAAccuracyEvaluator",
]
