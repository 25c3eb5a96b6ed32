"""Score TextVQA answers: `python -m llava.eval.eval_textvqa --annotation-file … --result-file … | --result-dir …`."""

from llava.eval.benchmarks.textvqa import evaluate, prompt_processor
from llava.eval.program import file_flag, program

__all__ = ["main", "prompt_processor"]

_FILES = (file_flag(name, required=False) for name in ("--result-file", "--result-dir"))
main = program(__doc__, evaluate, file_flag("--annotation-file"), *_FILES)

if __name__ == "__main__":
    raise SystemExit(main())
