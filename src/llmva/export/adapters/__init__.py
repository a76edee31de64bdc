"""The edit as a LoRA adapter, in the forms of those who load one."""
