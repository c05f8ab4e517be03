"""Files of other tools (safetensors, GGUF, PEFT, bitsandbytes), to a model and from one."""
