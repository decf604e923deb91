"""The adapters that speak OpenAI's API, whatever OpenAI-compatible server is behind them.

What is not ours to read goes on byte by byte: only the fields that a price or a promise hangs on
are taken out of a body, looked at and put back (https://platform.openai.com/docs/api-reference).
"""

from core.adapters.llm.adapter import LlmAdapter
from core.adapters.llm.request import read_chat, read_completion, read_embedding

CHAT = LlmAdapter(read_chat)
COMPLETIONS = LlmAdapter(read_completion)
EMBEDDINGS = LlmAdapter(read_embedding)
