"""The names that data sets give to fields and roles.

They are those of OpenAI's fine-tuning files, TRL, LLaMA-Factory, axolotl, ShareGPT, OpenAssistant
and OpenOrca. A name that is not here is not guessed.
"""

CHAT_FIELDS = ("messages", "conversations", "conversation")
"""A list of turns; the first that is there is read."""
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
"""A prompt and its answer; the first pair that is there is read."""
CONTEXT_FIELDS = ("input", "context")
"""Text that belongs to the prompt, beside each of these pairs."""
TEXT_FIELDS = ("text", "content")
SYSTEM_FIELDS = ("system", "system_prompt")
TOOL_FIELDS = ("tools", "functions")
PREFERENCE_FIELDS = ("chosen", "rejected")
MEDIA_FIELDS = ("images", "videos", "audios")

TURN_FIELDS = (("role", "content"), ("from", "value"), ("role", "text"), ("role", "value"))
"""Keys of a turn: who speaks, and what is said."""
TURN_PAIRS = (("user", "assistant"), ("human", "assistant"), ("input", "output"))
"""Keys of an object that stands for two turns, a question and its answer."""
MARK_FIELDS = ("weight", "train", "training", "loss")
"""Keys of a turn that say whether it carries loss."""
DETAIL_FIELDS = ("train_detail", "training_detail")
"""Keys of a turn that say which of its characters carry loss."""

FUNCTION_CALL = "function_call"
"""LLaMA-Factory's role of a turn whose content is a call of a tool, in JSON."""
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
"""Names of roles, in lower case, and the ones that chat templates know."""
