"""The embedded host: a small single-process GRPO trainer that calls the plugin hooks natively, without slime."""
