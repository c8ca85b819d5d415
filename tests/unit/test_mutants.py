"""The list of mutants fits the code; that the tests notice them is `make mutants`."""

from mutants.check import PROTOCOL, by_hand, drawn


def test_every_mutant_made_by_hand_changes_the_code_as_it_is():
    mutants = by_hand()
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    assert {mutant.file for mutant in mutants} >= set(PROTOCOL)


def test_drawn_mutants_are_programs_and_the_same_for_a_seed():
    for file in PROTOCOL:
        mutants = drawn(file, 20, seed=1)
        assert len({mutant.text for mutant in mutants}) == 20
        assert [mutant.name for mutant in mutants] == [mutant.name for mutant in drawn(file, 20, seed=1)]
