"""The operations that decide speed, each with a plain reference and fast versions."""
