"""The names of drafters: where each is, imported when it is asked for, and what help shows before."""

DRAFTERS = {
    "none": ("tokentree.drafters.none", "NoDrafter"),
    "draft_model": ("tokentree.drafters.draft_model", "DraftModel"),
    "ngram": ("tokentree.drafters.ngram", "NGram"),
    "suffix": ("tokentree.drafters.suffix", "Suffix"),
    "recycling": ("tokentree.drafters.recycling", "Recycling"),
    "eagle": ("tokentree.drafters.eagle", "Eagle"),
    "medusa": ("tokentree.drafters.medusa", "Medusa"),
    "merged": ("tokentree.drafters.merged", "Merged"),
}
LOOKUPS = ("recycling", "suffix", "ngram")  # they need nothing but the text; first come, first shown
