"""From a data set to token ids: files, formats, chat templates, tokens."""
