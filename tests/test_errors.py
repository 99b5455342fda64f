"""Whole numbers in flags, placements and names of checkpoints' folders are ASCII digits."""

import pytest

from ultramem_jax.cli.arguments import take_integer
from ultramem_jax.config.placement import parse_placement
from ultramem_jax.errors import UserError, whole_number
from ultramem_jax.parallel.distributed import Membership
from ultramem_jax.training.checkpoints import Checkpoints

NO_NUMBERS = {
    "empty": "",
    "full-width": "１２",
    "superscript": "²",
    "Arabic-Indic": "٣",
    "underscore": "1_0",
    "sign": "+1",
    "below zero": "-1",
    "blank": " 1",
    "line break": "1\n",
    "fraction": "1.0",
    "too many digits": "9" * 5000,
}
no_numbers = pytest.mark.parametrize("text", NO_NUMBERS.values(), ids=NO_NUMBERS)


def test_ascii_digits_are_a_number():
    assert [whole_number(text) for text in ("0", "12", "007", "9" * 18)] == [0, 12, 7, 10**18 - 1]


@no_numbers
def test_nothing_else_is(text):
    assert whole_number(text) is None


@no_numbers
def test_a_placement_of_it_is_refused(text):
    for placement in (f"{text}:12", f"1:{text}", f"{text}", f"1:{text}:2"):
        with pytest.raises(UserError, match="is not a span; allowed are") as error:
            parse_placement(placement, 12)
        assert "\n" not in str(error.value)


@no_numbers
def test_a_flag_of_it_is_refused(text):
    with pytest.raises(UserError, match=r"--processes = .* must be a whole number, 0 or above"):
        take_integer([f"--processes={text}"], "processes")


@no_numbers
def test_a_port_of_it_is_refused(text):
    with pytest.raises(UserError, match=r"--coordinator_address = .* must be HOST:PORT"):
        Membership(f"host:{text}", num_processes=2, process_id=0)


def test_a_folder_named_by_it_is_no_checkpoint(tmp_path):
    for name in ("4", "１２", "²", "٣"):
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [4]


def test_a_message_is_one_line_whatever_a_name_holds():
    assert str(UserError("a\nb.json: has  no\r\n 'x'")) == "a b.json: has  no 'x'"
