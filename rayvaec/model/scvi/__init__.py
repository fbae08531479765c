"""Models of scvi-tools: import, export, what each release computed."""
