"""experiments/locks/informed.py: how informed μ is: J by candidates left, nats of an episode that tries new ones, held out. Throw-away."""
import argparse, collections, json, numpy as np
from experiments.locks.kill import *
a=argparse.Namespace(max_tokens=512)
t,m=models.load_tokenizer("runs/locks/base8"),models.load_model("runs/locks/base8","cpu")
s=Sampler(TransformersEngine(m),t); g=sampled(a,s,problems("test",80),4,7)
rows=collections.defaultdict(list)
gains=collections.defaultdict(list)
for tr in (t for r in g for t in r):
    prev=None
    for j,b in enumerate(tr.boundaries):
        st=state(tr,j); n=[len(left(tr.prefix(b),v,S)) for v,(_,S) in zip("xy",locks_of(tr.problem))]
        if st in("none","x"):
            k=n[0] if st=="none" else n[1]
            rows[st,(k-1)//6].append((tr.J[j]*(30 if st=="none" else 1),1/k))
        if prev and prev[0]==st and st in("none","x"):
            k0=prev[1][st=="x"]; k1=n[st=="x"]
            gains[st,"new" if k1<k0 else "idle"].append((np.log(tr.J[j]/prev[2]),np.log(k0/k1)))
        prev=(st,n,tr.J[j])
out={"J against the even guess over what is left":{f"{'x' if s=='none' else 'y'} {6*k+1} to {6*k+6} left":[*np.mean(v,0).tolist(),*np.median(v,0).tolist()[:1],len(v)] for (s,k),v in sorted(rows.items())},
 "nats of an episode without a find, and of an ideal μ (means, medians)":{f"{'x' if s=='none' else 'y'}, {k}":[*np.mean(v,0).tolist(),*np.median(v,0).tolist(),len(v)] for (s,k),v in gains.items()}}
print(json.dumps(out,indent=0,ensure_ascii=False))
json.dump(out,open("runs/locks/kill/informed.json","w"),ensure_ascii=False)
