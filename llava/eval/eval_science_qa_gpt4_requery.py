"""Score the ScienceQA scheme in which GPT-4 is asked again where it disagrees with the model."""

from llava.eval.benchmarks.science_qa import OPTIONS, parse_options, requery
from llava.eval.program import file_flag, flag, program

_FILES = map(file_flag, ("--base-dir", "--gpt4-result", "--our-result", "--requery-result", "--output-result"))
_CHOICE = (flag("--split", default="test"), flag("--options", type=parse_options, default=OPTIONS))
main = program(__doc__, requery, *_FILES, *_CHOICE)

if __name__ == "__main__":
    raise SystemExit(main())
