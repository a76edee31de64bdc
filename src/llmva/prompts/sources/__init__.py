"""One source of prompts, a file, a folder or a data set of the hub: from its spec to its texts."""
