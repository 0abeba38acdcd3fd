"""The engine behind HTTP, in the form of the OpenAI API: needs the extra `serve`."""
