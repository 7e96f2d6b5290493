"""What exporters say while they work reaches nobody; what is said afterwards does."""

import logging
import sys
import warnings

import pytest

from twolevel.models.exporting.quiet import quiet


def chatter() -> None:
    warnings.warn("deprecated", FutureWarning, stacklevel=1)
    logging.getLogger("torch.fx.experimental.symbolic_shapes").error("no user code")
    logging.getLogger("onnxscript").critical("no rule")
    print("step 1/3")
    print("step 2/3", file=sys.stderr)


def test_nothing_is_said_inside_and_everything_after(capfd, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError), quiet():
            chatter()
            raise ValueError
        assert (caught, caplog.records, capfd.readouterr()) == ([], [], ("", ""))
        chatter()
    assert len(caught) == 1 and len(caplog.records) == 2
    assert capfd.readouterr().out == "step 1/3\n"
