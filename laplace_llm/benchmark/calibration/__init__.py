"""How well calibrated are the predictions of each method, on one's own model and task?"""
