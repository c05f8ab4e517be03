"""The names of fields and roles in data sets that the reader knows.

They come from OpenAI's fine-tuning files, TRL, LLaMA-Factory, axolotl, ShareGPT, OpenAssistant and
OpenOrca. The reader does not guess the meaning of other names.
"""

CHAT_FIELDS = ("messages", "conversations", "conversation")
"""Fields that hold a list of turns; the first one that is present is read."""
PROMPT_FIELDS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "generation"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("input", "output"),
)
"""Fields of a prompt and its answer; the first pair that is present is read."""
CONTEXT_FIELDS = ("input", "context")
"""Fields whose text is added to the prompt of a pair of `PROMPT_FIELDS`."""
TEXT_FIELDS = ("text", "content")
SYSTEM_FIELDS = ("system", "system_prompt")
TOOL_FIELDS = ("tools", "functions")
PREFERENCE_FIELDS = ("chosen", "rejected")
MEDIA_FIELDS = ("images", "videos", "audios")

TURN_FIELDS = (("role", "content"), ("from", "value"), ("role", "text"), ("role", "value"))
"""Keys of a turn: the role and the content."""
TURN_PAIRS = (("user", "assistant"), ("human", "assistant"), ("input", "output"))
"""Keys of an object that holds two turns, a question and its answer."""
MARK_FIELDS = ("weight", "train", "training", "loss")
"""Keys of a turn that say whether it carries loss."""
DETAIL_FIELDS = ("train_detail", "training_detail")
"""Keys of a turn that say which of its characters carry loss."""

FUNCTION_CALL = "function_call"
"""LLaMA-Factory's role for a turn whose content is a tool call in JSON."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    FUNCTION_CALL: "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Maps role names of data sets, in lower case, to the role names of chat templates."""
