from __future__ import annotations

import pickle

import pytest

from rayvaec import errors
from rayvaec.errors import RayvaecError, RequestError, UnprocessableError


def test_a_message_is_one_line_of_what_and_how_to_mend_it():
    assert str(RayvaecError("n is 0", "give n >= 1")) == "n is 0; give n >= 1"
    assert str(RayvaecError("the work failed")) == "the work failed"


def test_only_the_base_class_is_a_failure_in_the_work():
    tree = [value for value in vars(errors).values() if isinstance(value, type)]
    assert {error.exit_code for error in tree if error is not RayvaecError} == {2}
    assert RayvaecError.exit_code == 1
    assert all(error.__name__ in (errors.__doc__ or "") for error in tree)


def test_errors_survive_the_way_between_processes():
    error = RequestError("no", "yes", status=422, error="unknown_label", request_id="r1")
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert str(copy) == "no; yes"
    assert str(pickle.loads(pickle.dumps(RayvaecError("a", "b")))) == "a; b"


def subclasses(base: type[RequestError]) -> list[type[RequestError]]:
    return [base, *(each for below in base.__subclasses__() for each in subclasses(below))]


@pytest.mark.parametrize("kind", subclasses(RequestError), ids=lambda kind: kind.__name__)
def test_an_error_of_a_request_has_its_own_status_and_name(kind):
    error = kind("no", "yes")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.status, copy.error) == (kind.status, kind.error)
    assert 400 <= error.status < 600


def test_the_name_of_an_error_may_be_narrower_than_that_of_its_class():
    error = UnprocessableError("3 counts for 2 genes", "give one each", error="ragged_arrays")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.error) == (422, "ragged_arrays")
    assert UnprocessableError.error == "invalid_request"
