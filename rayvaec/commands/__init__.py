"""The verbs of the command `rayvaec`: one thin function each.

They import what they need when they run, so that --help and mistakes answer at once.
"""
