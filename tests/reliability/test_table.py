from figures import RESULTS
from table import BEGIN, DOCUMENT, END, table


def test_the_document_says_what_the_figures_say():
    assert DOCUMENT.read_text().split(BEGIN)[1].split(END)[0] == table(RESULTS)
