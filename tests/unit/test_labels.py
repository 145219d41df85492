"""Names become labels when they have earned it, up to a bound; a configuration's at once."""

import msgspec

from tokenwire_service.config import Config, Model
from tokenwire_service.labels import OTHER, Labels
from tokenwire_service.secret import Secret
from tokenwire_service.settings import Metrics
from tokenwire_service.telemetry import log_scrubber

MINE = Model(name="mine", upstream="u", upstream_model="theirs", aliases=("also",))
CONFIG = Config(models=(MINE,), metrics=Metrics(model_names=2))
SECRET = "sk-a-secret-key"


def labels(config: Config = CONFIG) -> Labels:
    return Labels(config, log_scrubber([Secret(SECRET)]))


def test_configured_names_have_their_own_at_once() -> None:
    made = labels()
    for name in ("mine", "also"):
        assert made.asked.label(name, answered=False) == name
        assert made.sent.label(name, answered=False) == OTHER
    assert made.sent.label("theirs", answered=False) == "theirs"
    assert made.asked.label("", answered=True) == ""


def test_others_earn_it_by_an_answer_while_there_is_room() -> None:
    made = labels().asked
    for number in range(100):
        assert made.label(f"no-{number}", answered=False) == OTHER
    assert [made.label(n, answered=True) for n in "abc"] == ["a", "b", OTHER]
    assert [made.label(n, answered=False) for n in "abc"] == ["a", "b", OTHER]


def test_none_that_holds_a_secret() -> None:
    made = labels().asked
    assert made.label(f"x-{SECRET}", answered=True) == OTHER
    assert [made.label(n, answered=True) for n in "ab"] == ["a", "b"]


def test_another_configuration_brings_its_names_and_keeps_what_was_earned() -> None:
    made = labels()
    assert made.asked.label("earned", answered=True) == "earned"
    new = Model(name="new", upstream="u", upstream_model="newer")
    made.take(msgspec.structs.replace(CONFIG, models=(new,)))
    assert made.asked.label("new", answered=False) == "new"
    assert made.sent.label("newer", answered=False) == "newer"
    assert made.asked.label("earned", answered=False) == "earned"
    assert made.asked.label("mine", answered=False) == OTHER


def test_no_room_at_all() -> None:
    made = labels(Config(metrics=Metrics(model_names=0)))
    assert made.asked.label("a", answered=True) == OTHER
