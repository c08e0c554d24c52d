"""What leaves a hospital, in words: shown at approval, printed for the hospital's IT, quoted in README."""

RECORDS = "number and digest of the last entries of its ledger and audit log"

LEAVES = (
    "per round: trained tensors minus the round's global ones, number of training slices rounded up to ten, share of pixels per "
    "expert, mean loss, validation Dice and its number of patients, steps and seconds of training, "
    f"{RECORDS}; once: the site's name and public key; on an error: a number and its title; only with share_summary = true in "
    "the site file, once per study: counts in tens and coarse ranges of the training images"
)

IN_INT8 = (
    "int8: the values of each row of a tensor as whole numbers from -127 to 127, and one exponent; what this rounding leaves out "
    "stays here and is added to the next round's update before that is rounded"
)
