"""The rules of `training.row_rules` in NumPy and float64, written from their definitions."""

import dataclasses

import numpy as np


def arrays_of(rule):
    """Lists a table and what a rule keeps: whether it has one number a row, and if integers."""
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
    """Returns the arrays of the rows that a step read, each (U, ...), after this step, counted from 0."""
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


def after_missed_steps(rule, rows, gradient, step, rate):
    """Returns `after_step` of one row by `adamw_catch_up`, by AdamW's own steps with gradients of zero.

    A row that steps did not read does not move in them. Only its moments do.
    """
    adamw = dataclasses.replace(rule, name="adamw")
    x, *moments, last = rows
    for missed in range(int(last.item()), step):
        _, *moments = after_step(adamw, [x, *moments], np.zeros_like(gradient), missed, rate)
    return [*after_step(adamw, [x, *moments], gradient, step, rate), np.full_like(last, step + 1)]
