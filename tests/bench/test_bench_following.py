"""Pairs of sentences of the quality job: which follow, which do not, and that parts share no text."""

from __future__ import annotations

import pytest
from test_bench_sentiment import packed

from benchmarks.quality import following, sentiment


def a_text(source, number, length):
    return following.Text(source, tuple(f"{source} {number}: {place}" for place in range(length)))


TEXTS = [a_text(source, number, 3 + number % 5) for source in ("news", "shop") for number in range(60)]


def archive(news, shop):
    inner = packed([(f"data/{name}", content) for name, content in zip(following.SOURCES, (news, shop), strict=True)])
    return packed([("x/additional_resources/data.tar.gz", inner)])


def test_a_pair_is_of_one_text_or_of_two_of_one_source():
    found = following.pairs(TEXTS)
    behind = {pair for text in TEXTS for pair in zip(text.sentences, text.sentences[1:], strict=False)}
    text_of = {sentence: text for text in TEXTS for sentence in text.sentences}
    assert [first for (first, _), _ in found] == [sentence for text in TEXTS for sentence in text.sentences[:-1]]
    for pair, label in found:
        assert label == (pair in behind)
        first, second = (text_of[sentence] for sentence in pair)
        assert first.source == second.source
        assert label or first is not second
    share = sum(label for _, label in found) / len(found)
    assert 0.4 < share < 0.6
    assert following.pairs(TEXTS) == found


def test_a_source_of_one_text_has_only_true_pairs():
    alone = a_text("news", 0, 4)
    assert {label for _, label in following.pairs([alone, a_text("shop", 1, 1)])} == {1}


def test_no_text_is_in_two_parts():
    found = following.split(TEXTS)
    parts = [
        {sentence.partition(":")[0] for pair, _ in part for sentence in pair}
        for part in (found.train, found.validation, found.test)
    ]
    assert all(any(name.startswith(source) for name in part) for part in parts for source in ("news", "shop"))
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_texts_are_read_in_their_order(tmp_path):
    news = "".join(f"{number}_{place}\t0.5\tN{number}, {place}.\r\n" for number in range(1, 30) for place in (1, 2, 3))
    shop = "".join(f"{number}_{place}\t-1\tS{number}, {place}.\r\n" for number in range(1, 30) for place in (1, 2))
    path = tmp_path / sentiment.ARCHIVE
    path.write_bytes(archive(news.encode(), shop.encode()))
    found = following.texts(path.read_bytes(), path.name, following.SOURCES[0])
    assert found[0] == following.Text(following.SOURCES[0], ("N1, 1.", "N1, 2.", "N1, 3."))
    assert len(found) == 29
    loaded = following.load(path)
    assert len(loaded.train) + len(loaded.validation) + len(loaded.test) == 29 * 2 + 29


@pytest.mark.parametrize("own", ["12", "_3", "12_", "12_x"])
def test_ids_that_name_no_text_are_refused(own):
    content = f"1_1\t0\tGood.\r\n{own}\t0\tBad.\r\n".encode()
    with pytest.raises(ValueError, match=f"expected ids of a text and a sentence, for example 12_3, got '{own}'"):
        following.texts(archive(content, content), "x", following.SOURCES[1])


def test_the_true_data():
    try:
        found = following.load()
    except OSError as error:
        pytest.skip(f"the sentences cannot be fetched: {error}")
    everything = [*found.train, *found.validation, *found.test]
    assert len(everything) == 5190 - 498 + 3708 - 300
    assert abs(sum(label for _, label in everything) / len(everything) - 0.5) < 0.02
    assert abs(len(found.test) / len(everything) - sentiment.TEST) < 0.01
