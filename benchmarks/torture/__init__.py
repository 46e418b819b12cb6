"""The attacks of `benchmarks/torture_bank.py`.

The process that runs them never opens a bank: what must be there is kept in plain dictionaries (`events.py`), and every
bank is opened in a child (`children.py`), which may be killed, crash or hang without taking the others along.
"""
