import os
import uuid

from openai import OpenAI

client = OpenAI(
    base_url=os.environ["FAREBOX_URL"] + "/v1",
    api_key=os.environ["FAREBOX_KEY"],
)

answer = client.chat.completions.with_raw_response.create(
    model=os.environ["FAREBOX_MODEL"],
    messages=[{"role": "user", "content": "Good morning"}],
    extra_headers={"Idempotency-Key": str(uuid.uuid4())},
)
print(answer.parse().choices[0].message.content)
charged, left = answer.headers["X-Credits-Charged"], answer.headers["X-Credits-Remaining"]
print(f"{charged} charged, {left} left")

with client.chat.completions.create(
    model=os.environ["FAREBOX_MODEL"],
    messages=[{"role": "user", "content": "Good evening"}],
    stream=True,
    stream_options={"include_usage": True},
    extra_headers={"Idempotency-Key": str(uuid.uuid4())},
) as stream:
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="")
        if chunk.usage:
            print()
            print(chunk.farebox["credits_charged"], "charged")
