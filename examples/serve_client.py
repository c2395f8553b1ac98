"""Ask a running `rocketkv serve` about one document: python examples/serve_client.py --file TEXT.

The document is a part of the message by itself, so the server can return to its end: the second question reads only
its own tokens. The package is OpenAI's: pip install openai.
"""

import argparse
import os
from pathlib import Path

import openai

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--file", type=Path, default=Path(__file__), help="the document; this file if none is given")
parser.add_argument("--context", help="id of a context file of the server, in place of the document")
parser.add_argument("--new-tokens", type=int, default=64)
args = parser.parse_args()

client = openai.OpenAI(base_url=args.url, api_key=os.environ.get("ROCKETKV_API_KEY", "none"))
[model] = client.models.list().data
document = {"type": "text", "text": args.file.read_text(encoding="utf-8")}

for question in ("What is this about?", "What is its first sentence?", "Say it in five words."):
    asked = {"type": "text", "text": question if args.context else f"\n\n{question}"}
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": [asked] if args.context else [document, asked]}],
        max_tokens=args.new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"context": args.context} if args.context else None,
    )
    print(f"> {question}")
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            used = chunk.usage.rocketkv
            print(
                f"\n[{used['read_tokens']} tokens read, {used['prefix_tokens']} not read again; first token after "
                f"{used['first_token_seconds']:.2f} s; {used['saved_bytes'] / 2**20:.1f} MiB saved]"
            )
