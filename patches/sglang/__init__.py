"""SGLang: its server's processes and requests, and running without a GPU."""
