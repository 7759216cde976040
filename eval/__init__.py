"""Evaluation: methods side by side that cannot flatter a prefix, what they cost, and reports.

Write `from eval.run import ...`, never `import eval`: the bare name is a builtin.
"""
