"""Many questions at once, one per line of standard input; a table of answers and errors.

python batch.py [MODEL] < questions.txt
"""
# ruff: noqa: T201 - it prints

import sys

from tokenwire import Client


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else "gpt-4o-mini"
    questions = [line.strip() for line in sys.stdin if line.strip()]
    failed = 0
    with Client() as client:
        for result in client.batch(questions, model=model, max_completion_tokens=100):
            if result.reply is not None:
                print(f"{result.index}\t{result.reply.text!r}")
                continue
            failed += 1
            print(f"{result.index}\t{result.error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
