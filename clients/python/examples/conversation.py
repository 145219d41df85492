"""A conversation at the terminal: streams each answer, Ctrl-C stops one, Ctrl-D ends.

python conversation.py [MODEL]
"""
# ruff: noqa: T201 - it prints

import sys

from tokenwire import Client, Message, TokenwireError


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "gpt-4o-mini"
    conversation: list[Message] = []
    with Client() as client:
        while question := ask():
            conversation.append({"role": "user", "content": question})
            stream = client.stream(conversation, model=model)
            try:
                for event in stream:
                    print(event.text, end="", flush=True)
            except KeyboardInterrupt:
                stream.close()
                print(" [stopped]", end="")
            except TokenwireError as error:
                print(f" [{error}]", end="")
            print()
            # What has arrived is what the person has seen: keep it in any case.
            conversation.append({"role": "assistant", "content": stream.text})


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
