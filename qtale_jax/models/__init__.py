"""The decoder: what a model is, its blocks and routers, the forward pass, Hugging Face import and export."""
