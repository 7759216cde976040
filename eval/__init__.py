"""Evaluation: conditions that cannot flatter a prefix, and reports.

Write `from eval.conditions import ...`, never `import eval`: the bare name is a builtin.
"""
