from figures import RESULTS
from table import BEGIN, DOCUMENT, END, table


def test_the_document_has_the_figures():
    assert DOCUMENT.read_text().split(BEGIN)[1].split(END)[0] == table(RESULTS)
