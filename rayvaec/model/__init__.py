"""The VAEC module, its saved form, and the bridge to scvi-tools."""
