"""The rules of `training.row_rules` in NumPy and float64, written from their definitions."""

import numpy as np


def arrays_of(rule):
    """What a table and a rule keep: of each array, whether it has one number a row, and whether integers."""
    kept = {
        "adamw": [(False, False), (rule.one_per_row, False)],
        "adamw_catch_up": [(False, False), (rule.one_per_row, False), (True, True)],
        "adagrad": [(False, False)],
        "adagrad_row": [(True, False)],
        "sgd": [],
        "sgd_momentum": [(False, False)],
    }
    return [(False, False), *kept[rule.name]]


def after_step(rule, rows, gradient, step, rate):
    """The arrays of the rows that were read after a step, counted from 0."""
    x, *state = rows
    squares = gradient**2
    if rule.name == "adagrad_row" or (rule.one_per_row and rule.name.startswith("adamw")):
        squares = squares.mean(1, keepdims=True)
    if rule.name.startswith("adamw"):
        first, second, *last = state
        if last:
            missed = step - last[0].astype(np.float64)
            first, second = rule.b1**missed * first, rule.b2**missed * second
        first = rule.b1 * first + (1 - rule.b1) * gradient
        second = rule.b2 * second + (1 - rule.b2) * squares
        root = np.sqrt(second / (1 - rule.b2 ** (step + 1))) + rule.eps
        direction = first / (1 - rule.b1 ** (step + 1)) / root
        state = [first, second, *(np.full_like(at, step + 1) for at in last)]
    elif rule.name.startswith("adagrad"):
        total = state[0] + squares
        with np.errstate(divide="ignore"):
            direction = gradient * np.where(total > 0, 1 / np.sqrt(total + rule.eps**2), 0)
        state = [total]
    elif rule.name == "sgd_momentum":
        direction = gradient + rule.momentum * state[0]
        state = [direction]
    else:
        direction = gradient
    return [x - rate * (direction + rule.weight_decay * x), *state]
