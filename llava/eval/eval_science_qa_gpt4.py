"""Score the ensemble of a model and GPT-4 on ScienceQA."""

from llava.eval.benchmarks.science_qa import OPTIONS, ensemble, parse_options
from llava.eval.program import file_flag, flag, program

_CHOICE = (flag("--split", default="test"), flag("--options", type=parse_options, default=OPTIONS))
main = program(__doc__, ensemble, *map(file_flag, ("--base-dir", "--gpt4-result", "--our-result")), *_CHOICE)

if __name__ == "__main__":
    raise SystemExit(main())
