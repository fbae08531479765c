from __future__ import annotations

import pickle

from rayvaec import errors
from rayvaec.errors import RayvaecError, RequestError


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
