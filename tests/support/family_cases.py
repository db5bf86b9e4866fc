import sys,time,torch,traceback,os
from tests.support.forget import forget_last_trainer
def child(t, opts, size):
    import transformers; transformers.logging.set_verbosity_error()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from ulysses_core.parallel.families.proof import train_small
    out={}
    for name,val,rows in opts:
        opt=(name,val) if name else None
        try: r=train_small(CONFIG_MAPPING[t],opt,rows,size)
        except Exception as e:
            r={'error':f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}', 'tb':traceback.format_exc()}
        out[f'{name}={val}|{rows}']=r
        forget_last_trainer()
    return out
