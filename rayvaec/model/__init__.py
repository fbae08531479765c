"""VAEC, its saved form, and import and export for scvi-tools."""
